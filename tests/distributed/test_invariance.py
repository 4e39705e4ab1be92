"""The same run under any layout: losses, gradient norms, router numbers and the trained weights.

The oracle is one rank. fp32 sums in another order differ in the seventh digit; five AdamW steps
multiply that, since the first steps move every weight by the learning rate whatever its gradient's
size, and a gradient near zero may differ in sign. Loss: 1e-5 relative; gradient norm: 1e-4.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
from layouts import changes
from safetensors.torch import load_file
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.commands.export import export_checkpoint

pytestmark = pytest.mark.distributed
QUICK = [
    "cp2 drops", "pp2 recompute-selective",
    "cp2 dp2 ep2 etp2", "pp2 vpp2 dp2 ep2", "tp2 cp2 ep2 recompute-full",
    "tp2 pp2 etp2 drops", "cp2 pp2 vpp2 ep2 capacity", "dp2 ep2 replicated", "tp2 pp2 dp2 ep4",
    "dp2 ep2 allgather", "cp2 ep2 padded", "pp2 dp2 ep2 first-3", "pp2 vpp2 layout-E|tt|tt|L",
]  # fmt: skip
THOROUGH = [
    "tp2", "dp2 etp2", "tp2 dp2 ep4 capacity", "pp2 dp2 ep2 layout-Ettt|tL",
    "cp2 pp2 ep2 recompute-moe", "dp4 ep4 drops recompute-moe",
    "tp2 pp2 vpp2 ep2 recompute-full", "tp2 dp2 ep2 etp2 drops",
    "tp4", "cp4", "pp4", "tp4 ep4 replicated", "tp2 etp2 capacity recompute-full",
    "dp2 ep2 capacity recompute-full", "pp2 dp2 ep2 drops", "cp2 dp2 ep4 capacity recompute-moe",
    "cp2 dp2 etp2 drops recompute-full", "pp2 vpp2 dp2 etp2 capacity recompute-moe",
    "tp2 cp2 dp2 ep4 etp2 drops", "tp2 cp2 pp2 ep2 etp2",
    "cp2 pp2 vpp2 dp2 ep4 drops recompute-full", "tp2 pp2 vpp2 dp2 ep2 etp2 drops",
    "tp2 pp2 vpp2 dp2 ep4 recompute-moe",
    "tp2 cp2 pp2 dp2 ep4 etp2", "tp2 cp2 pp2 vpp2 dp2 ep4 etp2 capacity recompute-full",
    "pp3 first-1 last-1", "pp3 dp2 etp2 layout-Et|t*3|L", "tp2 pp2 vpp2 ep2 layout-Et|t,|t|tL",
    "tp2 cp2 dp4 ep4", "tp2 dp2 ep2 etp2 allgather drops", "tp2 dp2 ep2 etp2 padded",
]  # fmt: skip
LAYOUTS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in THOROUGH)]
FEATURES = ["tp2", "cp2", "pp2", "vpp2", "ep2", "ep4", "etp2", "dp2", "capacity", "recompute"]


def test_every_pair_of_features_occurs_together():
    names = [name.replace("drops", "capacity") for name in QUICK + THOROUGH]
    together = [{word.partition("-")[0] for word in name.split()} for name in names]
    assert len(together) >= 30
    pairs = [{a, b} for a, b in itertools.combinations(FEATURES, 2) if {a, b} != {"ep2", "ep4"}]
    assert [pair for pair in pairs if not any(pair <= words for words in together)] == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("invariance")
    return {
        "root": root,
        "dense": save_dense(root / "dense", tie_word_embeddings=True),
        "kv2": save_dense(root / "kv2", "qwen3", num_key_value_heads=2),
        "tokens": write_tokens(root / "tokens"),
    }


def trained(
    inputs: dict[str, Path], name: str, dense: str = "dense"
) -> tuple[list[dict[str, Any]], Path]:
    """The metrics and the export of five steps under ``name``, run once."""
    where = inputs["root"] / f"{dense}-{name.replace(' ', '-')}"
    out = where.with_name(f"{where.name}-hf")
    if not out.exists():
        world_size, settings = changes(name)
        validation = {"validation_path": str(inputs["tokens"]), "validation_samples": 5}
        settings["moe"] |= {"num_moe_experts": 4, "moe_z_loss_coeff": 1e-3}
        settings["train"] |= {"steps": 5}
        run = tree(where, inputs[dense], inputs["tokens"], data=validation, **settings)
        run_training(run, world_size=world_size)
        export_checkpoint(where, out)
    return read_metrics(where), out


def test_more_tp_ranks_than_key_value_heads(inputs: dict[str, Path]):
    """Two ranks share a query group, and the norm of its keys."""
    assert_equal_steps(trained(inputs, "1", "kv2"), trained(inputs, "tp4 ep2", "kv2"), "tp4 ep2")


@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps_equal_those_of_one_rank(inputs: dict[str, Path], name: str):
    oracle = trained(inputs, "1 drops" if "drops" in name else "1")
    assert_equal_steps(oracle, trained(inputs, name), name)


Trained = tuple[list[dict[str, Any]], Path]


def assert_equal_steps(expected_run: Trained, run: Trained, name: str) -> None:
    (oracle, oracle_export), (lines, exported) = expected_run, run
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    for ours, expected in zip(lines, oracle, strict=True):
        for key, tolerance in [
            ("loss/lm", 1e-5), ("loss/validation", 1e-5), ("grad_norm", 1e-4),
            ("loss/load_balancing", 1e-5), ("loss/router_z", 1e-5), ("router/entropy", 1e-5),
            ("router/drop_rate", 1e-5), ("learning_rate", 0),
        ]:  # fmt: skip
            if key in expected:
                assert ours[key] == pytest.approx(expected[key], rel=tolerance), (key, ours)
    assert ("drops" in name) == (lines[-1]["router/drop_rate"] > 0.1)
    # Which expert a token chooses is a comparison of near-equal numbers: allow one in a hundred.
    assert lines[-1]["router/load_imbalance"] == pytest.approx(
        oracle[-1]["router/load_imbalance"], rel=1e-2
    )
    # One such token moves two of the loads, each by 1 / mean = 1 / 64.
    for load_E, expected_E in zip(
        lines[1]["router/load_by_expert"], oracle[1]["router/load_by_expert"], strict=True
    ):
        assert load_E == pytest.approx(expected_E, abs=0.02)
    weights = load_file(exported / "model.safetensors")
    for key, tensor in load_file(oracle_export / "model.safetensors").items():
        error = (weights[key] - tensor).abs()
        # Adam's first steps are +-lr for any gradient, so a near-zero one may go the other way.
        assert error.max() <= 5 * 1e-3, key
        assert error.median() <= 1e-6, (key, error.median())
