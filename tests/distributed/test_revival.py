"""Dead experts are re-created alike under every layout, and a resumed run is the uninterrupted one.

An expert counts as dead below 0.95 of the mean load, so that there are some. The oracle for weights
and optimizer state is the same run without revivals, edited by hand; for the loss, transformers
with weights edited by hand. Losses as in test_invariance.py.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Runs, make_runs, read_metrics
from transformers import AutoModelForCausalLM

from megatron_moe.checkpoint.folder import newest, read_progress
from megatron_moe.commands.export import export_checkpoint

pytestmark = pytest.mark.distributed
REVIVED = "router/revived"
REVIVES = {"revive_after_steps": 2, "revive_below_load": 0.95}
NEVER = {"revive_after_steps": None, "revive_below_load": 0.01}
FIRST = 2
"""Step after which the first experts are re-created."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("revival")
    held_out = {"validation_path": str(root / "tokens"), "validation_samples": 5}
    common: dict[str, dict[str, Any]] = {
        "moe": {"num_moe_experts": 8, "moe_layers": [0, 2, 3], **REVIVES},
        "upcycle": {"method": "drop"},
        "checkpoint": {"interval": 1, "keep": 9}, "data": held_out,
    }  # fmt: skip
    return make_runs(root, common=common)


@pytest.fixture(scope="module")
def one_rank(runs: Runs) -> list[dict[str, Any]]:
    return runs.train("one")


def same(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(lines[1:], expected[1:], strict=True):
        assert ours.get(REVIVED) == theirs.get(REVIVED)
        assert ours["loss/lm"] == pytest.approx(theirs["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def by_hand(
    plain: dict[str, torch.Tensor],
    revived: list[list[int]],
    *,
    master: bool,
    logits: str = "weight",
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint without revivals, with these ones made."""
    result = {key: tensor.clone() for key, tensor in plain.items()}
    for layer, expert, sibling in revived:
        for key in plain:
            routed = f".layers.{layer}.mlp.router." in key
            if not routed and f".layers.{layer}.mlp.experts." not in key:
                continue
            zero = key.startswith(("optimizer.exp_avg.", "optimizer.momentum_buffer."))
            result[key][expert] = 0 if zero else plain[key][sibling]
        key = f"decoder.layers.{layer}.mlp.router.{logits}"
        rows_ED = plain[f"optimizer.master.{key}" if master else key].double()
        row_D = (0.5 * (rows_ED.mean(dim=0) + rows_ED[sibling])).float()
        result[key][expert] = row_D.bfloat16().float() if master else row_D
        if master:
            result[f"optimizer.master.{key}"][expert] = row_D
    return result


@pytest.mark.parametrize(
    ("layout", "precision", "sections"),
    [
        ("1", "fp32", {}),
        ("tp2 dp2 ep2", "bf16", {}),
        pytest.param("pp2 dp2 ep2", "fp32", {"optimizer": {"exp_avg_sq_dtype": "bf16",
                     "optimizer_cpu_offload": True}}, marks=pytest.mark.slow),
        pytest.param("dp2 replicated", "bf16", {}, marks=pytest.mark.slow),
        pytest.param("dp2 etp2", "bf16", {"optimizer": {"optimizer": "muon"}},
                     marks=pytest.mark.slow),
    ],
    ids=["one", "bf16", "host", "replicated", "muon"],
)  # fmt: skip
def test_weights_and_moments_equal_a_copy_by_hand(
    runs: Runs, layout: str, precision: str, sections: dict[str, Any]
):
    """To the last bit, but for the router row: float64 sums may be in another order, 2^-24."""
    train, where = {"steps": FIRST, "precision": precision}, f"{layout} {precision} {len(sections)}"
    lines = runs.train(f"hand {where}", layout, train=train, **sections)
    runs.train(f"plain {where}", layout, train=train, moe=NEVER, **sections)
    revived = lines[FIRST][REVIVED]
    assert len({layer for layer, _, _ in revived}) >= 2, revived
    plain, ours = (runs.tensors(f"{name} {where}", FIRST) for name in ("plain", "hand"))
    expected = by_hand(plain, revived, master=precision == "bf16")
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith("router.weight") and "exp_avg" not in key:
            bound = 2**-8 if precision == "bf16" and not key.startswith("optimizer") else 2**-23
            torch.testing.assert_close(ours[key], tensor, rtol=bound, atol=1e-9)
        else:
            assert torch.equal(ours[key], tensor), key
    assert any(not torch.equal(plain[key], tensor) for key, tensor in expected.items())


def test_the_loss_after_a_revival_is_that_of_weights_copied_by_hand(
    runs: Runs, one_rank: list[dict[str, Any]]
):
    """transformers, on the held-out chunks: 1e-5 as in test_training.py."""
    from megatron_moe.data.samples import Samples
    from megatron_moe.data.stream import TokenStream

    dense = {"moe": {**NEVER, "moe_layers": "all"}}  # an architecture with MoE layers only
    lines = runs.train("loss plain", train={"steps": FIRST}, **dense)
    revives = runs.train("loss", train={"steps": FIRST}, moe={"moe_layers": "all"})
    export_checkpoint(runs.root / "loss plain", runs.root / "hf")
    model: Any = AutoModelForCausalLM.from_pretrained(runs.root / "hf", dtype=torch.float32)
    weights = model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for layer, expert, sibling in revives[FIRST][REVIVED]:
        prefix = f"model.layers.{layer}.mlp"
        for name in ("gate_up_proj", "down_proj"):
            key = f"{prefix}.experts.{name}"
            weights[key][expert] = before[key][sibling]
        key = f"{prefix}.gate.weight"
        weights[key][expert] = (before[key].mean(dim=0) + before[key][sibling]) / 2
    samples = Samples(TokenStream(runs.tokens, vocab_size=257), seq_length=32, seed=0)
    ids_BT = torch.stack([torch.from_numpy(samples.chunk(i).ids_T.copy()) for i in range(5)])
    with torch.no_grad():
        logits = model(ids_BT[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    assert loss.item() == pytest.approx(revives[FIRST]["loss/validation"], rel=1e-5)
    assert loss.item() != pytest.approx(lines[FIRST]["loss/validation"], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    ["pp2 dp2 ep2",
     *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp2 ep2", "cp2 etp2", "pp2 vpp2"))],
)  # fmt: skip
def test_a_layout_revives_as_one_rank(runs: Runs, one_rank: list[dict[str, Any]], layout: str):
    same(runs.train(layout.replace(" ", "-"), layout), one_rank)
    assert sum(REVIVED in line for line in one_rank) >= 2


@pytest.mark.parametrize(
    ("step", "later"),
    [
        (1, "tp2 ep2"),
        (FIRST, "1"),
        pytest.param(1, "1", marks=pytest.mark.slow),
        pytest.param(FIRST, "tp2 ep2", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    runs: Runs, one_rank: list[dict[str, Any]], later: str, step: int
):
    where = f"resumed-{later}-{step}"
    shutil.copytree(runs.root / "one", runs.root / where)
    (runs.root / where / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    same(runs.train(where, later), one_rank)
    unused = [read_progress(folder).unused_steps for run in (where, "one")
              if (folder := newest(runs.root / run)) is not None]  # fmt: skip
    assert unused[0] == unused[1]
    assert unused[0] is not None
    assert list(unused[0]) == ["0", "2", "3"]


def test_two_layer_gates_keep_their_first_layer(runs: Runs):
    moe = {"router_gate": "noisy_mlp"}
    lines = runs.train("gate", "dp2 ep2", train={"steps": FIRST}, moe=moe)
    runs.train("gate plain", "dp2 ep2", train={"steps": FIRST}, moe={**moe, **NEVER})
    plain, ours = (runs.tensors(name, FIRST) for name in ("gate plain", "gate"))
    expected = by_hand(plain, lines[FIRST][REVIVED], master=False, logits="output_weight")
    for key, tensor in expected.items():
        if key.endswith("router.weight"):
            assert torch.equal(ours[key], plain[key]), key
        else:
            torch.testing.assert_close(ours[key], tensor, rtol=2**-23, atol=1e-9)


def test_expert_biases_are_copied(runs: Runs):
    moe = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
           "moe_router_bias_update_rate": 1e-4}  # fmt: skip
    lines = runs.train("bias", "dp2 ep2", train={"steps": FIRST}, moe=moe)
    ours = runs.tensors("bias", FIRST)
    assert lines[FIRST][REVIVED]
    for layer, expert, sibling in lines[FIRST][REVIVED]:
        bias_E = ours[f"decoder.layers.{layer}.mlp.router.expert_bias"]
        assert bias_E[expert] == bias_E[sibling]


def test_the_log_and_the_report_name_what_was_revived(
    runs: Runs, one_rank: list[dict[str, Any]], tmp_path: Path
):
    from megatron_moe.report.page import run_page
    from megatron_moe.report.read import read_run

    revived = sum(len(line.get(REVIVED, ())) for line in read_metrics(runs.root / "one"))
    page = run_page(read_run(runs.root / "one"))
    assert f"Dead experts that were re-created: {revived}" in page
