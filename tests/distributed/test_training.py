"""What training does, by its numbers: it learns, drops where told to, and bf16 follows fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS
from tiny import save_dense
from training_runs import run_training, tree, write_tokens
from transformers import AutoModelForCausalLM

from megatron_moe.commands.export import export_checkpoint

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("training")
    return {
        "root": root,
        "dense": save_dense(root / "dense", tie_word_embeddings=True),
        "tokens": write_tokens(root / "tokens"),
    }


@pytest.fixture(scope="module")
def one_rank(inputs: dict[str, Path]) -> list[dict[str, Any]]:
    return train(inputs, "1")


def train(inputs: dict[str, Path], layout: str, **changes: Any) -> list[dict[str, Any]]:
    world_size, parallel = LAYOUTS[layout]
    validation = {"validation_path": str(inputs["tokens"]), "validation_samples": 5}
    settings = tree(
        inputs["root"] / layout, inputs["dense"], inputs["tokens"],
        parallel=parallel, data=validation, **changes,
    )  # fmt: skip
    return run_training(settings, world_size=world_size)


def export(inputs: dict[str, Path], layout: str) -> Path:
    out = inputs["root"] / f"{layout}-hf"
    if not out.exists():
        export_checkpoint(inputs["root"] / layout, out)
    return out


def test_the_export_scores_what_the_trainer_scored(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]]
):
    """transformers, on the same held-out chunks, gives the loss that the trainer logged."""
    from megatron_moe.data.samples import Samples
    from megatron_moe.data.stream import TokenStream

    model = AutoModelForCausalLM.from_pretrained(export(inputs, "1"), dtype=torch.float32)
    samples = Samples(TokenStream(inputs["tokens"], vocab_size=257), seq_length=32, seed=0)
    ids_BT = torch.stack([torch.from_numpy(samples.chunk(i).ids_T.copy()) for i in range(5)])
    with torch.no_grad():
        logits = model(ids_BT[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    assert loss.item() == pytest.approx(one_rank[-1]["loss/validation"], rel=1e-5)


def test_the_router_balances_and_learns(one_rank: list[dict[str, Any]]):
    assert one_rank[-1]["loss/validation"] < one_rank[0]["loss/validation"]
    assert one_rank[-1]["router/drop_rate"] == 0
    assert len(one_rank[-1]["router/load_imbalance_by_layer"]) == 4
    assert one_rank[-1]["loss/load_balancing"] == pytest.approx(1, abs=0.2)


def test_a_tight_capacity_drops_and_reports_it(inputs: dict[str, Path]):
    world_size, parallel = LAYOUTS["ep2"]
    settings = tree(
        inputs["root"] / "capacity", inputs["dense"], inputs["tokens"], parallel=parallel,
        moe={"num_moe_experts": 4, "moe_expert_capacity_factor": 0.5}, train={"steps": 1},
        optimizer={"warmup_steps": 0},
    )  # fmt: skip
    lines = run_training(settings, world_size=world_size)
    assert 0.5 <= lines[-1]["router/drop_rate"] < 0.7


def test_bf16_follows_fp32(inputs: dict[str, Path], one_rank: list[dict[str, Any]]):
    """bf16 has 8 bits of mantissa: 2^-8 relative per operation, 1% on a loss of 7."""
    _, parallel = LAYOUTS["ep2"]
    settings = tree(
        inputs["root"] / "bf16", inputs["dense"], inputs["tokens"],
        parallel=parallel, train={"steps": 5, "global_batch_size": 4, "precision": "bf16"},
    )  # fmt: skip
    lines = run_training(settings, world_size=2)
    for ours, expected in zip(lines[1:], one_rank[1:], strict=True):
        assert ours["loss/lm"] == pytest.approx(expected["loss/lm"], rel=2e-2)


def test_unhealthy_routers_are_reported_in_the_log(
    inputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
):
    """Every router has a busiest expert, which exceeds a bound next to the mean."""
    settings = tree(
        inputs["root"] / "health", inputs["dense"], inputs["tokens"],
        train={"steps": 4}, log={"router_warning_steps": 3, "router_max_load": 1.0001},
    )  # fmt: skip
    run_training(settings, world_size=1)
    log = " ".join(capfd.readouterr().out.split())
    assert [f"Step 3: the busiest expert of layer {n} has had more" in log for n in range(4)] == (
        [True] * 4
    )
    assert "Step 4: the busiest" not in log


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("muon", marks=pytest.mark.slow)])
def test_bf16_gradients_follow_fp32_ones(inputs: dict[str, Path], optimizer: str):
    """Two micro-batches and two ranks: 2 roundings of 2^-9 to a gradient, 1e-2 to its norm.

    Losses differ through weights that moved by at most 5 steps of 1e-3: 2e-3 of a loss of 7.
    """
    found = {}
    for in_fp32 in (True, False):
        settings = tree(
            inputs["root"] / f"gradients-{optimizer}-{in_fp32}", inputs["dense"], inputs["tokens"],
            parallel={"expert_parallel_size": 2}, optimizer={"optimizer": optimizer},
            train={"precision": "bf16", "grad_reduce_in_fp32": in_fp32},
        )  # fmt: skip
        found[in_fp32] = run_training(settings, world_size=2)[1:]
    assert found[True] != found[False]
    for ours, expected in zip(found[False], found[True], strict=True):
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
        assert ours["loss/lm"] == pytest.approx(expected["loss/lm"], rel=2e-3)
