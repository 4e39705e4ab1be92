"""Muon against its formula in float64, and one rank against every layout."""

import math
import shutil

import numpy as np
import pytest
from tiny import SHAPE
from training_runs import Runs, make_runs, read_metrics

pytestmark = pytest.mark.distributed
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
"""Coefficients of the quintic steps, from KellerJordan/modded-nanogpt (train_gpt_medium.py)."""
LR, MOMENTUM, DECAY = 1e-3, 0.9, 0.2
HEADS, GROUPS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
HEAD = SHAPE["hidden_size"] // HEADS
EVERY = {
    "moe": {"num_moe_experts": 4, "moe_layers": [1, 2, 3], "moe_ffn_hidden_size": 16,
            "moe_shared_expert_intermediate_size": 32},
    "upcycle": {"method": "split_random"},
    "optimizer": {"optimizer": "muon", "muon_momentum": MOMENTUM, "weight_decay": DECAY, "lr": LR,
                  "warmup_steps": 0, "lr_decay_style": "constant"},
    "checkpoint": {"interval": 1, "keep": 100},
}  # fmt: skip


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Return five Newton-Schulz steps of a matrix, times 0.2 sqrt(larger side), in float64."""
    x = matrix / np.linalg.norm(matrix)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return 0.2 * math.sqrt(max(matrix.shape)) * x


def fused(key: str, matrix: np.ndarray) -> list[np.ndarray]:
    """Return indices of the rows of each matrix that a parameter consists of."""
    rows = np.arange(len(matrix))
    if "linear_qkv" in key:  # by query group: its query heads, then key, then value
        by_group = rows.reshape(GROUPS, -1)
        parts = np.split(by_group, [HEADS // GROUPS * HEAD, (HEADS // GROUPS + 1) * HEAD], axis=1)
        return [part.ravel() for part in parts]
    return np.split(rows, 2) if "linear_fc1" in key else [rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("muon"), "qwen2", EVERY, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("tp2", "fp32"), ("pp2 dp2 etp2", "fp32"), ("dp2 ep2", "bf16"),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in [("1", "fp32"), ("dp2 ep2", "fp32"), ("dp2 replicated", "fp32"),
                       ("tp2", "bf16"), ("pp2 dp2 etp2", "bf16")]),
    ],
)  # fmt: skip
def test_an_update_is_the_formula_in_float64(runs: Runs, layout: str, precision: str):
    """The second step, from the weights and momentum of the first, each matrix on its own.

    The steps raise small singular values up to 490-fold (the product of the first coefficients),
    and with them fp32's rounding of 6e-8: 5e-5 of a unit singular value. In bf16 (4e-3), such
    values are noise: entries differ by up to a tenth of their root mean square of 0.2. Rows of a
    router's gradient sum to zero (softmax), so one of its four singular values is nothing else.
    """
    where = f"formula {layout} {precision}"
    runs.train(where, layout=layout, train={"steps": 2, "precision": precision},
        optimizer={"clip_grad": 1e9})  # fmt: skip
    before, after = runs.tensors(where, 1), runs.tensors(where, 2)
    master = "optimizer.master." if precision == "bf16" else ""
    matrices = [k for k, v in before.items() if f"optimizer.momentum_buffer.{k}" in before]
    assert len(matrices) > 15
    for key in matrices:
        m1, m2 = (x[f"optimizer.momentum_buffer.{key}"].numpy() for x in (before, after))
        gradient = (m2 - MOMENTUM * m1) / (1 - MOMENTUM)
        ahead = MOMENTUM * m2 + (1 - MOMENTUM) * gradient
        w1, w2 = before[master + key].numpy(), after[master + key].numpy()
        moved = (w1 * (1 - LR * DECAY) - w2) / LR
        for expert in range(len(w1)) if w1.ndim == 3 else [...]:
            for rows in fused(key, w1[expert]):
                expected = orthogonalized(ahead[expert][rows])
                error = moved[expert][rows] - expected
                if precision == "fp32":
                    assert np.abs(error).max() < 2e-3, key
                else:
                    limit = 0.5 if "router" in key else 0.1
                    assert np.sqrt((error**2).mean() / (expected**2).mean()) < limit, key
    others = {key for key in before if f"optimizer.exp_avg.{key}" in before}
    assert others.isdisjoint(matrices)
    assert all("norm" in k or "embedding" in k or "bias" in k for k in others)


LAYOUTS = [
    "tp2", "tp2 dp2 ep4",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("dp2 ep2", "pp2", "dp2 etp2", "cp2 dp2 ep2", "pp2 vpp2", "tp2 dp2", "cp2",
                   "tp2 replicated", "dp2 replicated")),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_steps_equal_those_of_one_rank(runs: Runs, layout: str):
    """Muon raises rounding 490-fold (see above), to 5e-5 of an update, of which a step is 1e-3."""
    if not (runs.root / "one").exists():
        runs.train("one", train={"steps": 4})
    lines = runs.train(f"layout {layout}", layout=layout, train={"steps": 4})
    for ours, expected in zip(lines[1:], read_metrics(runs.root / "one")[1:], strict=True):
        assert ours["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp2 ep2", "dp2 ep2"),
        ("dp2 ep2", "tp2"),
        pytest.param("pp2", "dp2 replicated", marks=pytest.mark.slow),
    ],
)
def test_a_resume_is_the_uninterrupted_run(runs: Runs, before: str, after: str):
    where = f"stayed {before}"
    if not (runs.root / where).exists():
        runs.train(where, layout=before, train={"steps": 4})
    moved = f"moved {before} {after}"
    shutil.copytree(runs.root / where, runs.root / moved)
    (runs.root / moved / "checkpoints" / "latest").write_text("step_00000002\n")
    lines = runs.train(moved, layout=after, train={"steps": 4})
    exact = before == after
    for ours, expected in zip(lines[3:], read_metrics(runs.root / where)[3:], strict=True):
        for key, tolerance in (("loss/lm", 1e-5), ("grad_norm", 1e-4)):
            close = 0 if exact else tolerance
            assert ours[key] == pytest.approx(expected[key], rel=close, abs=0), key
