"""The receipt's comparison with the dense model: known for copies, ordered for random splits."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

pytestmark = pytest.mark.distributed
SPLIT = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24}
LAYOUTS = {
    "one": (1, {}),
    "cp2-ep2-pp2": (4, {"context_parallel_size": 2, "expert_parallel_size": 2,
                        "pipeline_parallel_size": 2}),
    "tp2-etp2-dp2": (4, {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("against")
    save_dense(root / "dense", num_hidden_layers=2, hidden_size=32, vocab_size=257)
    write_tokens(root / "tokens")
    return root


def compared(
    folder: Path, run: Path, layout: str, moe: dict[str, Any], upcycle: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The receipt's comparison and the line of step 0."""
    world_size, parallel = LAYOUTS[layout]
    settings = tree(
        run, folder / "dense", folder / "tokens", parallel=parallel, moe=moe,
        upcycle={**upcycle, "verify": "always"},
        data={"validation_fraction": 0.25, "validation_samples": 7},
        train={"steps": 0, "global_batch_size": 4, "precision": "fp32"},
    )  # fmt: skip
    (line,) = run_training(settings, world_size=world_size)
    return json.loads((run / "receipt.json").read_text())["against_dense"], line


@pytest.mark.parametrize("layout", ["one", "tp2-etp2-dp2"])
def test_copies_are_the_dense_model(folder: Path, tmp_path: Path, layout: str):
    result, line = compared(folder, tmp_path, layout, {"num_moe_experts": 4}, {})
    assert result["text"] == "held-out"
    assert result["sequences"] == 7
    # fp32, the same products summed in another order.
    assert result["loss_moe"] == pytest.approx(result["loss_dense"], abs=1e-5)
    assert result["loss_moe"] == pytest.approx(line["loss/validation"], abs=1e-5)
    assert result["output_error"].keys() == {"0", "1"}
    assert all(0 < error < 2e-6 for error in result["output_error"].values())
    assert all(1 <= share < 4 for share in result["busiest_expert"].values())


def test_rescaling_brings_a_random_split_nearer_under_every_layout(folder: Path, tmp_path: Path):
    split = {"method": "split_random"}
    scaled, line = compared(folder, tmp_path / "scaled", "one", SPLIT, split)
    unscaled, _ = compared(
        folder, tmp_path / "unscaled", "one", SPLIT, {**split, "rescale": "none"}
    )
    for layer in ("0", "1"):
        assert scaled["output_error"][layer] < unscaled["output_error"][layer] < 1
        assert scaled["busiest_expert"][layer] == unscaled["busiest_expert"][layer]
    assert scaled["loss_moe"] == pytest.approx(line["loss/validation"], abs=1e-5)
    assert unscaled["loss_moe"] == unscaled["loss_split_random_unscaled"]
    assert scaled["loss_split_random_unscaled"] == unscaled["loss_moe"] != scaled["loss_moe"]
    other, _ = compared(folder, tmp_path / "other", "cp2-ep2-pp2", SPLIT, split)
    assert other["busiest_expert"] == scaled["busiest_expert"]
    for key in ("loss_dense", "loss_moe", "loss_split_random_unscaled", "output_error"):
        # fp32, the same products summed in another order; no choice is so near as to change.
        assert other[key] == pytest.approx(scaled[key], abs=1e-5), key
