"""Test that each rule's message has both values, the reason and a way out that satisfies it."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from legal_runs import FFN, GROUPS, HEADS, LAYERS, make_config, make_spec, parallel

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.parallel.layout import fold, local_experts
from megatron_moe.rules.check import RULES, Case, check, legal_layout, violations


@pytest.mark.parametrize(
    ("changes", "world_size", "message"), [pytest.param(*r[1:], id=r[0]) for r in refusals.ALL]
)
def test_a_message_has_setting_rule_reason_and_way_out(changes, world_size: int, message: str):
    assert violations(make_config(), make_spec(), 1) == [], "the unchanged configuration is legal"
    assert violations(make_config(changes), make_spec(), world_size) == [message]


def test_layers_that_stay_dense_are_sharded_over_tp():
    spec = make_spec(intermediate_size=50)
    changes = parallel(tp=3) | {"moe.moe_layers": [0, 1]}
    assert violations(make_config(changes), spec, 3) == [
        "intermediate_size of the dense model (50) must be divisible by "
        "parallel.tensor_parallel_size (3): the layers that stay dense are sharded over tp.\n"
        "  valid tensor_parallel_size: 1, 2, 5, 10, 25, 50"
    ]
    assert violations(make_config(changes | {"moe.moe_layers": "all"}), spec, 3) == []


def test_every_rule_is_tested_here():
    spec = make_spec(intermediate_size=50)
    dense = (parallel(tp=3) | {"moe.moe_layers": [0]}, 3)
    violated = set()
    for changes, world_size in [*((r[1], r[2]) for r in refusals.ALL), dense]:
        case = Case(make_config(changes), spec, world_size)
        violated |= {rule for rule in RULES if list(rule(case))}
    windows = Case(make_config(), replace(spec, attention_windows=(4, None)), 1)
    violated |= {rule for rule in RULES if list(rule(windows))}
    assert violated == set(RULES)


def test_all_violations_come_in_one_error():
    changes = parallel(tp=4, ep=3, cp=2) | {
        "moe.moe_router_topk": 9, "data.seq_length": 50, "optimizer.min_lr": 1.0,
    }  # fmt: skip
    messages = violations(make_config(changes), make_spec(), 7)
    assert len(messages) == 7
    with pytest.raises(ConfigError) as caught:
        check(make_config(changes), make_spec(), 7)
    suggestion = "  no layout of 7 ranks is legal with the other settings"
    assert str(caught.value) == "\n".join([*messages, suggestion])
    for setting in (
        "pp * cp * tp", "pp * ep * etp", "num_key_value_heads", "num_moe_experts",
        "moe_router_topk", "seq_length", "min_lr",
    ):  # fmt: skip
        assert sum(setting in message for message in messages) >= 1, setting


@pytest.mark.parametrize(
    "changes",
    [
        parallel(vpp=1),
        {"moe.moe_router_topk": 1, "moe.router_order": "softmax_topk"},
        {"moe.moe_router_topk": 8},
        {"train.steps": 0},
        {"optimizer.warmup_steps": 0},
        {"data.seq_length": 256},
        {"moe.moe_ffn_hidden_size": FFN},
        {"moe.moe_layers": [11]},
        {"optimizer.min_lr": 3e-5},
        {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_steps": 8},
        {"optimizer.lr_decay_steps": 3},
        {"train.stages": [{"steps": 9, "freeze": ["experts"]}, {}]},
        {"train.freeze": ["router"], "optimizer.lr_multipliers": {"experts": 2.0}},
        {"train.freeze": ["router@11"]},
        {"optimizer.exp_avg_sq_dtype": "bf16", "optimizer.adam_beta2": 0.99609375},
        {"optimizer.exp_avg_dtype": "bf16", "optimizer.adam_beta2": 0.999},
        {"optimizer.lr_multipliers": {"experts@0-5": 2.0, "experts@6-11": 3.0}},
        {"train.freeze": ["router", "experts", "attention", "embeddings", "norms@0-11"]},
        {"optimizer.warmup_steps": 100, "optimizer.lr_warmup_fraction": 0.9},
    ],
    ids=lambda changes: ",".join(f"{k.split('.')[1]}={v}" for k, v in changes.items()),
)
def test_the_edge_of_a_rule_is_legal(changes: dict[str, Any]):
    check(make_config(changes), make_spec(), 1)


SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8])
RANDOM = st.fixed_dictionaries(
    {
        "parallel.tensor_parallel_size": SIZES,
        "parallel.context_parallel_size": SIZES,
        "parallel.pipeline_parallel_size": SIZES,
        "parallel.virtual_pipeline_parallel_size": st.none() | SIZES,
        "parallel.expert_parallel_size": SIZES,
        "parallel.expert_tensor_parallel_size": SIZES,
        "moe.num_moe_experts": st.integers(1, 16),
        "moe.moe_layers": st.just("all") | st.just([0, 5]),
        "data.seq_length": st.sampled_from([32, 48, 96, 100, 240]),
        "train.global_batch_size": st.integers(1, 64),
        "train.micro_batch_size": st.integers(1, 3),
    }
)


def worlds_of(changes: dict[str, Any]) -> list[int]:
    """Return world sizes that are legal for the layout, and some others."""
    tp, cp, pp, ep, etp = (
        changes[f"parallel.{name}_parallel_size"]
        for name in ("tensor", "context", "pipeline", "expert", "expert_tensor")
    )
    return sorted({pp * tp * cp, pp * ep * etp, pp * tp * cp * ep * etp, 24, 7})


@given(changes=RANDOM, data=st.data())
@settings(max_examples=300)
def test_accepted_configurations_divide_and_fold(changes: dict[str, Any], data: st.DataObject):
    world_size = data.draw(st.sampled_from(worlds_of(changes)))
    config, spec = make_config(changes), make_spec()
    if violations(config, spec, world_size):
        return
    assert_runs(config, spec, world_size)


LEGAL_DEGREES = [
    pytest.param(tp, cp, pp, vpp, ep, etp, id=f"tp{tp}-cp{cp}-pp{pp}-vpp{vpp}-ep{ep}-etp{etp}")
    for tp, cp, pp, vpp, ep, etp in itertools.product(
        (1, 3), (1, 2), (1, 2), (1, 3), (1, 4), (1, 3)
    )
    if pp > 1 or vpp == 1
]


@pytest.mark.parametrize(("tp", "cp", "pp", "vpp", "ep", "etp"), LEGAL_DEGREES)
def test_degrees_that_divide_are_accepted(tp, cp, pp, vpp, ep, etp):
    """Check that no rule is too strict: all these degrees divide 144 and can run."""
    degrees = parallel(tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)
    config = make_config(degrees | {"train.global_batch_size": 144 * 2})
    check(config, make_spec(), 144)
    assert_runs(config, make_spec(), 144)


def assert_runs(config: RunConfig, spec: ModelSpec, world_size: int) -> None:
    """Assert that everything that is sharded is divided evenly."""
    layout = fold(config.parallel, world_size=world_size)
    vpp = config.parallel.virtual_pipeline_parallel_size or 1
    pp, dp, cp, tp = layout.attention.shape
    experts = [
        local_experts(layout, rank=rank, num_experts=config.moe.num_moe_experts)
        for rank in layout.experts.groups("ep")[0]
    ]
    assert [e for run in experts for e in run] == list(range(config.moe.num_moe_experts))
    assert spec.num_query_groups % tp == 0
    assert spec.num_attention_heads % tp == 0
    assert spec.ffn_hidden_size % layout.experts.size("etp") == 0
    assert spec.num_layers % (pp * vpp) == 0
    assert config.data.seq_length % cp == 0
    assert config.data.seq_length // cp % (tp * (2 if cp > 1 else 1)) == 0
    micro_batches, rest = divmod(config.train.global_batch_size, dp * config.train.micro_batch_size)
    assert rest == 0
    assert micro_batches >= 1
    assert vpp == 1 or micro_batches % pp == 0


@given(changes=RANDOM, data=st.data())
@settings(max_examples=200)
def test_every_suggested_value_satisfies_the_rule(changes: dict[str, Any], data: st.DataObject):
    world_size = data.draw(st.sampled_from(worlds_of(changes)))
    for message in violations(make_config(changes), make_spec(), world_size):
        suggestions = list(suggested(message))
        assert "\n  " in message, "every message ends with a way out"
        for setting in suggestions:
            world = setting.pop("world_size", world_size)
            left = violations(make_config(changes | setting), make_spec(), world)
            assert rule_of(message) not in map(rule_of, left), (message, setting)


def rule_of(message: str) -> str:
    """Return the message without its numbers, which another value would change."""
    return re.sub(r"[\d.]+", "#", message.splitlines()[0].replace("2 * cp * tp", "tp"))


def suggested(message: str):
    """Yield each value of the indented line as a change of settings."""
    lines = r"\n  (?:valid|nearest|largest|smallest) ([\w. ]+): (.*)"
    if ends := re.findall(r"(parallel\.num_layers_in_\w+)=(\d+)", message):
        yield {name: int(value) for name, value in ends}
    for name, values in re.findall(lines, message):
        for value in values.split(", "):
            if name == "pp x vpp":
                pp, vpp = map(int, value.split("x"))
                yield parallel(pp=pp, vpp=vpp)
            else:
                full = f"parallel.{name}" if name.endswith("parallel_size") else name
                yield {full: int(value)}


@given(changes=RANDOM, data=st.data())
@settings(max_examples=50)
def test_the_nearest_legal_layout_is_legal_and_no_nearer_one_is(
    changes: dict[str, Any], data: st.DataObject
):
    """Compare with an exhaustive search over all degrees up to the world size."""
    world_size = data.draw(st.sampled_from([w for w in worlds_of(changes) if w <= 24]))
    config, spec = make_config(changes), make_spec()
    suggestion = legal_layout(config, spec, world_size)
    legal = [
        degrees
        for degrees in itertools.product(*[divisors(world_size)] * 3, range(1, 13),
                                         *[divisors(world_size)] * 2)
        if is_legal_layout(changes, degrees, world_size)
    ]  # fmt: skip
    current = tuple(changes[name] or 1 for name in DEGREES)
    if current in legal or (world_size == 1 and not legal):  # one rank has one layout
        assert suggestion == []
    elif not legal:
        assert suggestion == [f"  no layout of {world_size} ranks is legal with the other settings"]
    else:
        assert suggestion[0].startswith(f"  nearest legal layout of {world_size} ranks: parallel.")
        changed = re.findall(r"(parallel\.\w+)=(\d+)", suggestion[0])
        nearest = tuple(int(dict(changed).get(name, changes[name] or 1)) for name in DEGREES)
        assert nearest in legal
        least = min(distance(degrees, current) for degrees in legal)
        assert distance(nearest, current) == pytest.approx(least)


DEGREES = [f"parallel.{name}_parallel_size" for name in (
    "tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")]  # fmt: skip


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def is_legal_layout(changes: dict[str, Any], degrees: tuple[int, ...], world_size: int) -> bool:
    """Return whether a layout is legal, by an independent one-line version of each rule."""
    tp, cp, pp, vpp, ep, etp = degrees
    length, batch = changes["data.seq_length"], changes["train.global_batch_size"]
    if world_size % (tp * cp * pp) or world_size % (pp * ep * etp):
        return False
    micro, rest = divmod(batch, changes["train.micro_batch_size"] * (world_size // (tp * cp * pp)))
    return not (
        rest
        or HEADS % tp
        or (GROUPS % tp and tp % GROUPS)  # ranks may share a query group
        or changes["moe.num_moe_experts"] % ep
        or FFN % etp
        or (changes["moe.moe_layers"] != "all" and FFN % tp)
        or LAYERS % (pp * vpp)
        or (vpp > 1 and (pp == 1 or micro % pp))
        or length % (tp * (2 * cp if cp > 1 else 1))
        or changes["moe.num_moe_experts"] < 2  # top-2 with one expert is illegal in any layout
    )
