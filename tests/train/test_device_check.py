"""A flipped bit in a weight or a gradient is noticed and its rank named; the check changes nothing.

The oracles are a run without the check, and the rank in which the test flips the bit.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.commands import pretraining
from megatron_moe.config.load import build
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.errors import JobError
from megatron_moe.parallel.layout import fold
from megatron_moe.runtime.world import World
from megatron_moe.train.device_check import PassNumbers, Tolerance, suspects
from megatron_moe.train.step import Mark

EXACT = Tolerance(0.0, 0.0)
STEP = 4
"""Step in which the tests flip a bit; steps 2 and 4 are checked."""


# ---- who is wrong: a pure decision ---------------------------------------------------------------


def passes(world: int, size: int, wrong: dict[tuple[int, int], float]) -> list[list[PassNumbers]]:
    """Three passes of one stage; ``wrong`` maps pass and computing rank to an error of the norm."""
    shifts = [shift * size for shift in range(3)]
    return [
        [
            PassNumbers(7, 2.0, 1.0 + (rank + shifts[k]) % world + wrong.get((k, rank), 0.0))
            for rank in range(world)
        ]
        for k in range(3)
    ]


ALWAYS_3 = {(k, 3): 0.5 for k in range(3)}


@pytest.mark.parametrize(
    ("world", "size", "wrong", "expected"),
    [
        (6, 2, {}, []),
        (6, 2, ALWAYS_3, [3]),  # three replicas: named, although it is always wrong
        (6, 2, {(0, 3): 0.5}, [3]),
        (6, 2, {(1, 5): 0.5}, [5]),
        (4, 2, ALWAYS_3, [1, 3]),  # two replicas cannot tell
        (4, 2, {(0, 3): 0.5}, [3]),  # but a fault that goes away is found
        (4, 2, {(1, 3): 0.5}, [3]),
        (4, 4, {(0, 1): 0.5}, [1]),  # one replica repeats
        (4, 4, {(2, 1): 0.5}, [1]),
        (4, 4, {(k, 1): 0.5 for k in range(3)}, []),
    ],
)
def test_the_odd_one_out_is_named(
    world: int, size: int, wrong: dict[tuple[int, int], float], expected: list[int]
):
    parallel = Parallel(tensor_parallel_size=size)
    replicas = fold(parallel, world_size=world).replicas
    assert (replicas.size, replicas.count) == (size, world // size)
    assert suspects(passes(world, size, wrong), replicas, EXACT) == expected


def test_other_weights_explain_other_numbers():
    replicas = fold(Parallel(tensor_parallel_size=2), world_size=6).replicas
    results = passes(6, 2, {(k, rank): 0.5 for k in range(3) for rank in (2, 3)})
    assert suspects(results, replicas, EXACT) == [2, 3]
    damaged = [
        [PassNumbers(8, n.loss, n.grad_norm) if r == 3 else n for r, n in enumerate(row)]
        for row in results
    ]
    assert suspects(damaged, replicas, EXACT) == [3]


def test_ranks_that_share_experts_are_one_replica():
    replicas = fold(Parallel(pipeline_parallel_size=2, expert_parallel_size=2), world_size=8)
    assert (replicas.replicas.size, replicas.replicas.count) == (2, 2)
    assert [replicas.replicas.counterpart(rank, 1) for rank in range(8)] == [2, 3, 0, 1, 6, 7, 4, 5]


def test_not_a_number_is_the_same_everywhere():
    nan = PassNumbers(7, float("nan"), float("nan"))
    replicas = fold(Parallel(), world_size=2).replicas
    assert suspects([[nan] * 2] * 2, replicas, EXACT) == []


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    save_dense(root / "dense", num_hidden_layers=2)
    write_tokens(root / "tokens")
    return root


def settings(root: Path, name: str, interval: int | None, **changes: Any) -> dict[str, Any]:
    changes["guard"] = {} if interval is None else {"device_check_interval": interval}
    changes["train"] = {
        "steps": 3, "global_batch_size": 6, "precision": "bf16", **changes.get("train", {}),
    }  # fmt: skip
    return tree(root / name, root / "dense", root / "tokens", **changes)


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without times and memory."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time", "throughput", "memory"))}
        for line in lines
    ]


TWO_PARTS = {"parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "three-replicas": (3, {}),
    "overlap": (2, {"train": {"global_batch_size": 4, "overlap_grad_reduce": True}}),
    "no-overlap": (2, {"train": {"global_batch_size": 4, "overlap_grad_reduce": False}}),
    "shared-experts-one-replica": (
        2, {"parallel": {"expert_parallel_size": 2}, "train": {"global_batch_size": 4}},
    ),
    "expert-bias": (
        2,
        {
            "moe": {
                "num_moe_experts": 4, "moe_router_enable_expert_bias": True,
                "moe_router_score_function": "sigmoid",
            },
            "train": {"global_batch_size": 4},
        },
    ),
    "global-balance": (
        2,
        {
            "moe": {
                "num_moe_experts": 4, "moe_router_load_balancing_type": "global_aux_loss",
                "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001,
            },
            "train": {"global_batch_size": 8},
        },
    ),
    "noisy-router": (
        2,
        {
            "moe": {
                "num_moe_experts": 4, "router_gate": "noisy_mlp",
                "moe_router_load_balancing_type": "cv_squared", "moe_aux_loss_coeff": 0.01,
            },
            "train": {"global_batch_size": 4, "recompute": "full"},
        },
    ),
    "teacher": (
        2,
        {
            "teacher": {"logits_weight": 0.5, "layers_weight": 0.1},
            "train": {"global_batch_size": 4},
        },
    ),
    "tp-pp": (4, {**TWO_PARTS, "train": {"global_batch_size": 4}}),
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("noisy-router", "tp-pp") else [])
        for name in SETTINGS
    ],
)
def test_checking_changes_no_number(inputs: Path, name: str):
    """Bits agree: the first pass leaves no trace, and gradients are summed in the same order."""
    world, changes = SETTINGS[name]
    without = run_training(settings(inputs, name, None, **changes), world_size=world)
    checked = run_training(settings(inputs, f"{name}-2", 2, **changes), world_size=world)
    assert len(without) > 2
    assert numbers(without) == numbers(checked)


WEIGHT = "decoder.layers.1.self_attention.linear_proj.weight"


def weight_of(state: Any) -> Any:
    return dict(state.model.modules[0].named_parameters())[WEIGHT]


def flip_weight(state: Any, at: Mark, batches: int) -> Mark:
    """Flip bit 12, of the exponent, in one bf16 weight of this rank."""
    weight_of(state).data.view(torch.int16).flatten()[0] ^= 1 << 12
    return at


def flip_gradient(state: Any, at: Mark, batches: int) -> Mark:
    """Flip a bit of one gradient in the step itself, before its last backward pass."""
    backward_passes = []

    def flipping(stage: str) -> None:
        at(stage)
        if stage == "backward":
            backward_passes.append(stage)
            if len(backward_passes) == 2 * batches:
                gradient = weight_of(state).main_grad.flatten()
                gradient.view(torch.int32)[gradient.abs().argmax()] ^= 1 << 26

    return flipping


def damaged_run(world: World, config: RunConfig, rank: int, flip: Callable[..., Mark]) -> None:
    """Train; one rank flips a bit in step `STEP`."""
    from megatron_moe.commands.train import train

    step = pretraining.train_step

    def damaging(state: Any, batches: Any, *args: Any, at: Mark, **kwargs: Any) -> Any:
        if world.rank == rank and state.step + 1 == STEP:
            at = flip(state, at, len(batches))
        return step(state, batches, *args, at=at, **kwargs)

    pretraining.train_step = damaging
    train(config, world)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "world", "rank", "flip", "named"),
    [
        ("three-weight", 3, 1, flip_weight, r"rank 1 \(\S+\)"),
        ("three-gradient", 3, 2, flip_gradient, r"rank 2 \(\S+\)"),
        ("two-weight", 2, 1, flip_weight, r"rank 0 \(\S+\) or rank 1 \(\S+\)"),
        ("two-gradient", 2, 1, flip_gradient, r"rank 1 \(\S+\)"),
        ("one-gradient", 1, 0, flip_gradient, r"rank 0 \(\S+\)"),
    ],
)
def test_a_flipped_bit_ends_the_job_and_names_the_rank(
    inputs: Path, name: str, world: int, rank: int, flip: Callable[..., Mark], named: str
):
    train = {"steps": 5}
    config = build(RunConfig, settings(inputs, name, 2, train=train, checkpoint={"interval": 3}))
    config.run.dir.mkdir()
    with pytest.raises(JobError) as caught:
        run_on_ranks(damaged_run, config, rank, flip, world_size=world)
    message = str(caught.value)
    assert re.match(f"{named} computed wrong numbers for step {STEP}, without an error", message)
    assert "The step was not applied. Weights since step 2 may be affected.\n  leave " in message
    assert [line["step"] for line in read_metrics(config.run.dir) if line["step"]] == [1, 2, 3]


@pytest.mark.distributed
def test_one_replica_cannot_see_a_wrong_weight(inputs: Path):
    """The limit that the documentation states: both passes use the same wrong weight."""
    config = build(RunConfig, settings(inputs, "one-weight", 2, train={"steps": 4}))
    config.run.dir.mkdir()
    run_on_ranks(damaged_run, config, 0, flip_weight, world_size=1)
