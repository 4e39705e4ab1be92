"""Test counts of routers with known preferences on real ranks, and that the model is unaffected.

The expected counts are computed from the tokens of the text alone.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from known_routers import (
    EXPERTS,
    LAYERS,
    experts_of,
    save_silent,
    set_routers,
    write_classes,
)
from layouts import changes
from ranks import run_on_ranks
from training_runs import tree

from megatron_moe.analyze.load import distances
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow
SEQ_LENGTH, SAMPLES = 32, 5
TEXTS = {"one": [0], "same": [0], "other": [2], "mixed": [0, 1]}
"""Classes of each domain's tokens."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("collect")
    length = SEQ_LENGTH * SAMPLES + 1
    return {
        "root": root,
        "dense": save_silent(root / "dense"),
        "ids": {
            name: write_classes(root / name, classes, length=length, seed=len(name))
            for name, classes in TEXTS.items()
        },
    }


def run_config(inputs: dict[str, Any], name: str) -> tuple[int, RunConfig]:
    world_size, layout = changes(name)
    settings = tree(inputs["root"] / "run", inputs["dense"], inputs["root"] / "one", **layout)
    settings["train"] |= {"micro_batch_size": 2}
    return world_size, build(RunConfig, settings)


@pytest.mark.parametrize(
    "name",
    [
        "1",
        "tp2 ep2",
        "cp2 pp2 vpp2 recompute-full",
        pytest.param("dp4 ep4", marks=slow),
        pytest.param("pp2", marks=slow),
    ],
)
def test_known_preferences_give_the_known_counts(inputs: dict[str, Any], name: str):
    world_size, config = run_config(inputs, name)
    run_on_ranks(check_counts, config, inputs, world_size=world_size)


def check_counts(world: World, config: RunConfig, inputs: dict[str, Any]) -> None:
    from megatron_moe.train.step import mean_loss

    collector, feed, modules, (model, groups) = made(world, config, inputs)
    counts = {}
    for domain, ids in inputs["ids"].items():
        batches = feed.held_out(domain)
        before = mean_loss(modules, batches, config, model, groups)
        routed = collector.read(batches, num_samples=SAMPLES)
        after = mean_loss(modules, batches, config, model, groups)
        assert before == routed.loss == after  # bitwise equal: observation changes nothing
        assert routed.tokens == SEQ_LENGTH * SAMPLES
        assert routed.chosen_HLE.equal(expected_counts(ids)), (domain, routed.chosen_HLE)
        together_LEE = expected_together(ids)
        assert routed.together_LEE.equal(together_LEE), (domain, routed.together_LEE)
        assert not routed.dropped_L.any()
        counts[domain] = routed.chosen_HLE.sum(dim=0).numpy()
        # Every token's logits are a permutation of (0.2, 0.1, 0, 0) times its one feature.
        feature = 1 / math.sqrt(1 / 64 + 1e-5)
        best = 1 / (1 + math.exp(-0.1 * feature) + 2 * math.exp(-0.2 * feature))
        assert (routed.confidence_L / routed.tokens).tolist() == pytest.approx([best] * LAYERS)
    check_distances(counts)


def check_distances(counts: dict[str, np.ndarray]) -> None:
    """Check that "one" and "same" use the same two experts, and "other" the other two.

    The distance of the latter is sqrt(4 * (1/2)^2) = 1.
    """
    apart_LZZ = distances(np.stack(list(counts.values())))
    assert apart_LZZ[:, 0, 1] == pytest.approx(np.zeros(LAYERS))
    assert apart_LZZ[:, 0, 2] == pytest.approx(np.ones(LAYERS))


def expected_counts(ids: np.ndarray) -> torch.Tensor:
    """Return counts by half, layer and expert; the third of five samples is in the first half."""
    counts_HLE = torch.zeros(2, LAYERS, EXPERTS, dtype=torch.int64)
    for position, token in enumerate(ids[:-1]):
        half = int(2 * (position // SEQ_LENGTH) >= SAMPLES)
        for layer in range(LAYERS):
            for expert in experts_of(token % 4, layer):
                counts_HLE[half, layer, expert] += 1
    return counts_HLE


def expected_together(ids: np.ndarray) -> torch.Tensor:
    together_LEE = torch.zeros(LAYERS, EXPERTS, EXPERTS, dtype=torch.int64)
    for token in ids[:-1]:
        for layer in range(LAYERS):
            for a in experts_of(token % 4, layer):
                for b in experts_of(token % 4, layer):
                    together_LEE[layer, a, b] += 1
    return together_LEE


def made(world: World, config: RunConfig, inputs: dict[str, Any]) -> Any:
    """Return the collector, the data feed, and the constructed model of this rank."""
    from megatron_moe.analyze.collect import Collector
    from megatron_moe.data.feed import DataRank, Feed
    from megatron_moe.data.texts import Texts, open_text
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.hf.reader import open_safetensors
    from megatron_moe.model.build import build_model
    from megatron_moe.model.upcycle import upcycle
    from megatron_moe.parallel.groups import create_groups

    layout, groups = create_groups(config.parallel, seed=0)
    dense = open_safetensors(inputs["dense"])
    model = build_model(
        config, dense.spec, layout=layout, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    upcycle(model, dense, plan, layout=layout, rank=world.rank)
    set_routers(model)
    vocab_size = dense.spec.vocab_size
    texts = {n: open_text(inputs["root"] / n, config, vocab_size=vocab_size) for n in TEXTS}
    feed = Feed(
        Texts(training={}, validation=texts, references=None, remarks=[]),
        config, DataRank.of(groups),
    )  # fmt: skip
    collector = Collector(model, model.modules, config, groups, layers=range(LAYERS))
    return collector, feed, model.modules, (model, groups)


@pytest.mark.parametrize("name", ["drops", pytest.param("drops tp2 dp2 ep2", marks=slow)])
def test_dropped_choices_are_counted(inputs: dict[str, Any], name: str):
    world_size, config = run_config(inputs, name)
    run_on_ranks(check_drops, config, inputs, world_size=world_size)


def check_drops(world: World, config: RunConfig, inputs: dict[str, Any]) -> None:
    """Check drops: of 64 tokens, each of 2 experts keeps 64 * 2 / 4 * 0.75 = 24."""
    collector, feed, _, _ = made(world, config, inputs)
    routed = collector.read(feed.held_out("one"), num_samples=SAMPLES)
    # The fifth sample shares its micro-batch with a sample that only fills it. Among ties, the
    # first positions are kept: 12 of each sample. Of 64 choices of a full batch, 40 are dropped.
    assert routed.dropped_L.tolist() == [2 * (40 + 40 + 20)] * LAYERS
    assert routed.chosen_HLE.sum(dim=0).equal(expected_counts(inputs["ids"]["one"]).sum(dim=0))
