"""Mixtures that move: weights follow the rule, samples follow the weights, under any layout."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import read_progress, step_folder

pytestmark = pytest.mark.distributed
DOMAINS = ("code", "wiki", "books")
REFERENCES = {"code": 6.0, "wiki": 5.0, "books": 9.0}
STEPS = 6
STEP_TOKENS = 4 * 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Domains of different vocabularies, so that they are not equally hard."""
    root = tmp_path_factory.mktemp("mixture")
    for seed, (name, vocab_size) in enumerate(zip(DOMAINS, (257, 40, 9), strict=True)):
        write_tokens(root / name, vocab_size=vocab_size, seed=seed)
    (root / "references.json").write_text(json.dumps(REFERENCES))
    return {"root": root, "dense": save_dense(root / "dense")}


def settings(inputs: dict[str, Path], run: str, layout: str, **changes: Any) -> dict[str, Any]:
    root = inputs["root"]
    made = tree(
        root / run, inputs["dense"], root, parallel=LAYOUTS[layout][1], train={"steps": STEPS},
        checkpoint={"interval": 2}, **changes,
    )  # fmt: skip
    made["data"] = {
        "domains": {
            name: {"path": str(root / name), "weight": weight}
            for name, weight in zip(DOMAINS, (0.5, 0.3, 0.2), strict=True)
        },
        "validation_fraction": 0.2,
        "validation_samples": 5,
        "seq_length": 32,
        "mixing": {
            "update": "sheared_llama",
            "reference_losses": str(root / "references.json"),
            "interval": 2 * STEP_TOKENS,
            "floor": 0.01,
        },
    }
    return made


@pytest.fixture(scope="module")
def one_rank(inputs: dict[str, Path]) -> list[dict[str, Any]]:
    return run_training(settings(inputs, "one", "1"), world_size=1)


def column(lines: list[dict[str, Any]], name: str) -> list[tuple[float, ...]]:
    return [tuple(line[f"{name}/{domain}"] for domain in DOMAINS) for line in lines]


def test_weights_move_as_the_rule_says(one_rank: list[dict[str, Any]]):
    """The rule again, from the logged losses, with nothing but ``math``."""
    weights = [0.5, 0.3, 0.2]
    for line in one_rank[1:]:
        if line["step"] % 2 == 0:
            excess = [
                max(0.0, round(line[f"loss/validation/{d}"], 4) - REFERENCES[d]) for d in DOMAINS
            ]
            grown = [w * math.exp(e) for w, e in zip(weights, excess, strict=True)]
            weights = [0.99 * w / sum(grown) + 0.01 / 3 for w in grown]
        else:
            assert "loss/validation" not in line
        output = [line[f"mixing/weight/{d}"] for d in DOMAINS]
        assert output == pytest.approx(weights, abs=1e-12), line["step"]
    assert max(abs(w - s) for w, s in zip(weights, (0.5, 0.3, 0.2), strict=True)) > 0.1


def test_samples_follow_the_weights(one_rank: list[dict[str, Any]]):
    owed, consumed = [0.0] * 3, [0] * 3
    weights = (0.5, 0.3, 0.2)
    for line in one_rank[1:]:
        for _ in range(4):
            owed = [o + w for o, w in zip(owed, weights, strict=True)]
            chosen = owed.index(max(owed))
            owed[chosen] -= 1
            consumed[chosen] += 1
        weights = tuple(line[f"mixing/weight/{d}"] for d in DOMAINS)
        shares = [count / sum(consumed) for count in consumed]
        assert [line[f"mixing/share/{d}"] for d in DOMAINS] == pytest.approx(shares)
        # 16 documents of 300 tokens are left to train on: 149 samples of 32 tokens.
        assert [line[f"mixing/epochs/{d}"] for d in DOMAINS] == pytest.approx(
            [count / 149 for count in consumed]
        )


@pytest.mark.parametrize("layout", ["tp2-ep2", "cp2"])
def test_another_layout_draws_the_same_samples(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]], layout: str
):
    lines = run_training(settings(inputs, layout, layout), world_size=LAYOUTS[layout][0])
    for ours, expected in zip(lines, one_rank, strict=True):
        for name in (name for name in expected if name.startswith("loss/")):
            assert ours[name] == pytest.approx(expected[name], rel=2e-5), (name, ours["step"])
    for name in ("mixing/weight", "mixing/share", "mixing/epochs"):
        assert column(lines[1:], name) == column(one_rank[1:], name)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_continues_with_weights_and_samples(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]], stop_at: int
):
    resumed = settings(inputs, "one", "1")
    run_dir = Path(resumed["run"]["dir"])
    saved = read_progress(step_folder(run_dir, stop_at)).blend
    line = one_rank[stop_at]
    assert saved["weights"] == [line[f"mixing/weight/{d}"] for d in DOMAINS]
    assert sum(saved["consumed"]) == 4 * stop_at
    (run_dir / "checkpoints" / "latest").write_text(f"step_{stop_at:08d}\n")
    lines = run_training(resumed, world_size=1)
    same = [n for n in one_rank[-1] if n.startswith(("loss/", "mixing/", "grad"))]
    for ours, expected in zip(lines, one_rank, strict=True):
        assert {n: ours.get(n) for n in same} == {n: expected.get(n) for n in same}


def test_a_run_resumes_under_another_layout(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]]
):
    root = inputs["root"]
    shutil.copytree(root / "one", root / "moved")
    (root / "moved" / "checkpoints" / "latest").write_text("step_00000002\n")
    lines = run_training(settings(inputs, "moved", "tp2-ep2"), world_size=2)
    for name in ("mixing/weight", "mixing/share", "mixing/epochs"):
        assert column(lines[1:], name) == column(one_rank[1:], name)
    for ours, expected in zip(lines, one_rank, strict=True):
        for name in (name for name in expected if name.startswith("loss/")):
            assert ours[name] == pytest.approx(expected[name], rel=2e-5), (name, ours["step"])


def test_weights_that_stay_are_those_of_the_configuration(inputs: dict[str, Path], capfd):
    first = settings(inputs, "static", "1")
    first["data"] |= {"mixing": {}, "validation_fraction": None}
    first["train"]["steps"] = 2
    run_training(first, world_size=1)
    output = " ".join(capfd.readouterr().out.split())
    assert "data code: 187 samples of 32 tokens, weight 0.5, 0.02 epochs in this run" in output
    first["data"]["domains"]["code"]["weight"] = 0.2
    first["data"]["domains"]["books"]["weight"] = 0.5
    first["train"]["steps"] = 3
    lines = run_training(first, world_size=1)
    assert column(lines[1:], "mixing/weight") == [(0.5, 0.3, 0.2)] * 2 + [(0.2, 0.3, 0.5)]
    output = " ".join(capfd.readouterr().out.split())
    assert "Domain weights changed on resume. Previous weights: {'code': 0.5" in output


def test_one_text_reports_no_mixture(inputs: dict[str, Path]):
    single = tree(
        inputs["root"] / "single", inputs["dense"], inputs["root"] / "code",
        data={"validation_fraction": 0.2, "seq_length": 32}, train={"steps": 1},
        optimizer={"warmup_steps": 0},
    )  # fmt: skip
    lines = run_training(single, world_size=1)
    assert "loss/validation" in lines[-1]
    assert not [name for line in lines for name in line if name.startswith("mixing/")]
    assert 0 < lines[-1]["time/data_seconds"] < lines[-1]["time/step_seconds"]
