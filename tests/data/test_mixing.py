"""Published mixture weights sum to 1, and the update rules follow their papers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.mixtures import (
    LLAMA_2_7B_LOSSES,
    PRESETS,
    SLIMPAJAMA,
    check_weights,
    preset_weights,
)
from megatron_moe.data.mixing import (
    updated_weights,
    updates_due,
)
from megatron_moe.errors import ConfigError, DataError

LOSS = st.floats(0.1, 10)
DOMAINS = st.integers(2, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(1e-4, 1), min_size=n, max_size=n),
        st.lists(LOSS, min_size=n, max_size=n),
        st.lists(LOSS, min_size=n, max_size=n),
    )
)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_shares_of_the_seven_domains(preset: str):
    domains = tuple(reversed(SLIMPAJAMA))
    weights = preset_weights(preset, domains)
    assert tuple(weights) == domains
    assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-15)
    assert weights["c4"] == pytest.approx({"llama": 0.15, "sheared": 0.492}[preset])


def test_an_update_by_hand():
    # Two domains: the first is 1 nat above its reference, the second is below its reference.
    updated = updated_weights([0.5, 0.5], [3.0, 1.0], [2.0, 1.5], rule="sheared_llama", floor=0.01)
    e = math.e
    assert updated == pytest.approx([0.99 * e / (e + 1) + 0.005, 0.99 / (e + 1) + 0.005])
    updated = updated_weights([0.5, 0.5], [3.0, 1.0], [2.0, 1.5], rule="doremi", floor=0.01)
    up, down = math.e, math.exp(-0.5)
    assert updated == pytest.approx(
        [0.99 * up / (up + down) + 0.005, 0.99 * down / (up + down) + 0.005]
    )


def test_an_update_at_the_reference_stands_still():
    losses = list(LLAMA_2_7B_LOSSES.values())
    weights = list(preset_weights("sheared", SLIMPAJAMA).values())
    for rule in ("sheared_llama", "doremi"):
        updated = updated_weights(weights, losses, losses, rule=rule)
        assert updated == pytest.approx([(1 - 1e-4) * w + 1e-4 / 7 for w in weights], abs=1e-12)


@given(DOMAINS, st.sampled_from(["sheared_llama", "doremi"]))
def test_updates_stay_shares_and_favour_the_worst(drawn, rule):
    weights, losses, references = drawn
    updated = updated_weights(weights, losses, references, rule=rule)
    assert math.fsum(updated) == pytest.approx(1, abs=1e-12)
    assert min(updated) >= 1e-4 / len(updated) * (1 - 1e-9)
    excess = [loss - reference for loss, reference in zip(losses, references, strict=True)]
    worst = max(range(len(excess)), key=excess.__getitem__)
    # Without the floor the worst domain gains relative to every other.
    free = updated_weights(weights, losses, references, rule=rule, floor=0.0)
    for i in range(len(free)):
        assert free[worst] * weights[i] >= free[i] * weights[worst] * (1 - 1e-9)


@given(DOMAINS)
def test_the_sheared_rule_ignores_how_much_better_a_domain_is(drawn):
    weights, losses, references = drawn
    clamped = [max(loss, reference) for loss, reference in zip(losses, references, strict=True)]
    assert updated_weights(weights, losses, references, rule="sheared_llama") == pytest.approx(
        updated_weights(weights, clamped, references, rule="doremi")
    )


def test_large_losses_do_not_overflow_and_broken_ones_are_refused():
    updated = updated_weights([0.5, 0.5], [2000.0, 1.0], [1.0, 1.0], rule="sheared_llama")
    assert updated == pytest.approx([1 - 5e-5, 5e-5])
    with pytest.raises(DataError, match=r"cannot update the mixture: losses .*nan"):
        updated_weights([0.5, 0.5], [math.nan, 1.0], [1.0, 1.0], rule="sheared_llama")


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 40),
)
def test_updates_fall_on_the_same_places_however_the_run_is_cut(steps: list[int], interval: int):
    position, due = 0, 0
    for step in steps:
        due += updates_due(position, position + step, interval=interval)
        position += step
    assert due == updates_due(0, position, interval=interval) == position // interval


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "at least one domain"),
        ({"a": 0.0, "b": 1.0}, r"weight of domain 'a' \(0.0\) must be positive"),
        ({"a": -0.5, "b": 1.5}, r"weight of domain 'a' \(-0.5\)"),
        ({"a": math.nan}, r"'a' \(nan\)"),
        ({"a": 7.0, "b": 3.0}, r"sum to 10, and must sum to 1(?s:.*)a: 0.7, b: 0.3"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        check_weights(weights)


def test_presets_refuse_other_domains():
    with pytest.raises(ConfigError, match="'lama' is not known; known: llama, sheared"):
        preset_weights("lama", SLIMPAJAMA)
    with pytest.raises(ConfigError, match=r"missing \['arxiv'\], without a weight \['papers'\]"):
        preset_weights("llama", [*(d for d in SLIMPAJAMA if d != "arxiv"), "papers"])
