"""Settings of the optimizer, data parallelism and dropping, one by one, by what they change."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from training_runs import Runs, make_runs, tree

from megatron_moe.checkpoint.folder import find_checkpoint
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.engine import TORCH_ON_CPU, TORCH_ON_CUDA, TRANSFORMER_ENGINE, Engine
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("settings"), num_hidden_layers=2)


# ---- optimizer.clip_grad -------------------------------------------------------------------------


def moments(run: Path) -> dict[str, torch.Tensor]:
    """The first moments of the newest checkpoint, by tensor."""
    with GlobalTensors(find_checkpoint(run)) as tensors:
        names = [name for name in tensors.names if "exp_avg." in name]
        return {name: tensors.read(name, index=None, dtype=torch.float32) for name in names}


def test_gradients_are_clipped_to_the_norm(runs: Runs):
    """After one step the first moment is 0.1 g: of the clipped gradient, as by hand of the other.

    fp32: the clipped run multiplies every gradient by one rounded factor, then by 0.1.
    """
    one_step = {"train": {"steps": 1, "global_batch_size": 4}}
    free = runs.train("free", **one_step, optimizer={"warmup_steps": 0, "clip_grad": 1e9})
    norm = free[-1]["grad_norm"]
    tight = {"warmup_steps": 0, "clip_grad": norm / 8}
    clipped = runs.train("clipped", **one_step, optimizer=tight)
    assert clipped[-1]["grad_norm"] == norm, "logged before clipping"
    whole, cut = moments(runs.root / "free"), moments(runs.root / "clipped")
    assert whole.keys() == cut.keys()
    assert len(whole) > 10
    for name, moment in whole.items():
        torch.testing.assert_close(cut[name], moment / 8, rtol=1e-5, atol=1e-12)


# ---- train.overlap_grad_reduce, train.overlap_param_gather ---------------------------------------


def test_overlapping_the_reduction_changes_no_loss(runs: Runs):
    """A sum over two ranks has one rounding in either order, so losses agree to the last bit."""
    lines = {
        overlap: runs.train(
            f"overlap-{overlap}", "dp2",
            train={"steps": 3, "global_batch_size": 4, "overlap_grad_reduce": overlap},
        )
        for overlap in (True, False)
    }  # fmt: skip
    losses = {k: [x["loss/lm"] for x in v if "loss/lm" in x] for k, v in lines.items()}
    assert len(losses[True]) == 3
    assert losses[True] == losses[False]


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_are_reduced_when_the_setting_says(runs: Runs, overlap: bool):
    config = build(RunConfig, runs.settings("buckets", train={"overlap_grad_reduce": overlap}))
    run_on_ranks(check_reduction, config, world_size=2)


def check_reduction(world: World, config: RunConfig) -> None:
    """With overlap, a bucket is sent during the backward pass; without, when all gradients are."""
    from megatron_moe.bench.build import make_supply, make_timed_state
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.guard import StepGuard
    from megatron_moe.train.step import train_step

    layout, groups = create_groups(config.parallel, seed=0)
    state = make_timed_state(config, world, layout, groups, random=True, balanced=False)
    batches = make_supply(config, state.model.spec, groups, random=True)(state)
    (wrapped,) = state.wrapped
    finished, sent = [], []
    bucket_groups = wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups
    for bucket in bucket_groups:
        send = bucket.start_grad_sync

        def start(*args: Any, send: Any = send, **kwargs: Any) -> None:
            sent.append(bool(finished))
            send(*args, **kwargs)

        bucket.start_grad_sync = start
    finalize = state.model.transformer.finalize_model_grads_func
    assert finalize is not None

    def backward_is_finished(*args: Any, **kwargs: Any) -> None:
        finished.append(True)
        finalize(*args, **kwargs)

    state.model.transformer.finalize_model_grads_func = backward_is_finished
    for _ in range(2):  # in a first step, Megatron-Core only counts the gradients of a bucket
        finished.clear()
        sent.clear()
        train_step(state, batches, config, groups, guard=StepGuard(config.guard), at=lambda _: None)
    assert len(sent) == len(bucket_groups) > 0
    assert set(sent) == {not config.train.overlap_grad_reduce}


@pytest.mark.parametrize(
    ("engine", "sharded", "wanted", "overlaps"),
    [
        (TRANSFORMER_ENGINE, True, True, True),
        (TORCH_ON_CUDA, True, True, True),
        (TORCH_ON_CUDA, True, False, False),
        (TORCH_ON_CUDA, False, True, False),  # every rank has all weights: nothing to gather
        (TORCH_ON_CPU, True, True, False),  # gloo has no stream to overlap with
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_weights_are_gathered_when_the_setting_says(
    runs: Runs, engine: Engine, sharded: bool, wanted: bool, overlaps: bool
):
    from megatron_moe.train.state import _overlaps_gather

    config = build(
        RunConfig,
        runs.settings(
            "gather",
            train={"overlap_param_gather": wanted},
            optimizer={"use_distributed_optimizer": sharded},
        ),
    )
    assert _overlaps_gather(config, engine) is overlaps


# ---- moe.moe_token_drop_policy -------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_who_is_dropped_is_the_policys(runs: Runs, policy: str):
    """With position, no expert drops the first tokens: there the copies compute the dense model.

    An expert keeps 4 of 32 tokens (32 tokens * 2 choices / 4 experts * 0.25), so the first 4 tokens
    keep both choices, and no later token reaches them through causal attention.
    """
    capacity = {"moe_expert_capacity_factor": 0.25, "moe_token_drop_policy": policy}
    config = build(RunConfig, runs.settings("drop", moe={"num_moe_experts": 4, **capacity}))
    run_on_ranks(check_dropped, config, world_size=1)


def check_dropped(world: World, config: RunConfig) -> None:
    from megatron_moe.bench.build import make_timed_state
    from megatron_moe.hf.load import load_model
    from megatron_moe.model.verify import _moe_logits
    from megatron_moe.parallel.groups import create_groups

    layout, groups = create_groups(config.parallel, seed=0)
    state = make_timed_state(config, world, layout, groups, random=False, balanced=False)
    tokens_S = torch.randint(257, (32,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_SV = _moe_logits(state.model, tokens_S, groups)
        dense = load_model(config.source.path, device="cpu", dtype=torch.float32)
        expected_SV = dense(tokens_S[None]).logits[0]
    assert logits_SV is not None
    error_S = (logits_SV[:, :257] - expected_SV).abs().amax(dim=1)
    # fp32 rounding of logits of up to 40: 1e-3 is 200 units in the last place.
    assert (error_S[4:] > 1e-2).any()
    assert bool((error_S[:4] < 1e-3).all()) == (config.moe.moe_token_drop_policy == "position")


# ---- data.warn_above_epochs ----------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "warns"), [(0.1, True), (0.2, False), (None, False)])
def test_repetition_is_announced_above_the_limit(limit: float | None, warns: bool):
    """20 of 160 samples are an eighth of the text."""
    from megatron_moe.data.announce import announcement
    from megatron_moe.data.blend import start_blend

    data = {} if limit is None else {"warn_above_epochs": limit}
    config = build(RunConfig, tree(Path("run"), Path("dense"), Path("text"), data=data))
    assert config.train.steps * config.train.global_batch_size == 20
    texts: Any = SimpleNamespace(training={"text": SimpleNamespace(num_chunks=160)}, remarks=())
    blend = start_blend({"text": 1.0})
    text = announcement(texts, blend, config)
    assert ("domain text will be read 0.1 times, more than 0.1: " in text) == warns
    assert "0.12 epochs in this run" in text
