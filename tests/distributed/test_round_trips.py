"""An export can be a source again, and is exported as the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS
from tiny import save_dense, save_moe
from training_runs import run_training, tree, write_tokens

from megatron_moe.analyze.similarity import layer_similarity
from megatron_moe.checkpoint.folder import find_checkpoint, read_config
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.resuming import with_source
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.from_source import complete_from_source
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.load import load_model
from megatron_moe.hf.spec import read_spec
from megatron_moe.source.open import open_source

pytestmark = pytest.mark.distributed


def exported(
    folder: Path, source: Path, *, layout: str = "1", steps: int = 0, precision: str = "fp32",
    **sections: dict[str, Any],
) -> Path:  # fmt: skip
    """Train a run from ``source`` and export it to ``folder/hf``."""
    world_size, parallel = LAYOUTS[layout]
    tokens = folder.parent / "tokens"
    if not tokens.with_name("tokens.idx").exists():
        write_tokens(tokens)
    settings = tree(
        folder / "run", source, tokens, parallel=parallel,
        train={"steps": steps, "global_batch_size": 4, "precision": precision},
        optimizer={"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 0}, **sections,
    )  # fmt: skip
    if "moe" not in sections:
        del settings["moe"]
    run_training(complete_from_source(settings), world_size=world_size)
    export_checkpoint(folder / "run", folder / "hf")
    return folder / "hf"


def check_similarities(run: Path, source: Path) -> None:
    """`analyze` finds that copies are equal to each other and to their source expert."""
    checkpoint = find_checkpoint(run)
    config, spec = read_config(checkpoint), read_spec(source)
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    with GlobalTensors(checkpoint) as tensors:
        alike = layer_similarity(tensors, plan, 1, [open_source(source)])
    assert alike.to_dense_E is not None
    assert alike.to_dense_E.tolist() == pytest.approx([1.0] * 8)
    pairs_44 = alike.between_EE.unflatten(0, (4, 2)).unflatten(2, (4, 2)).mean(dim=(1, 3))
    assert pairs_44.diagonal().tolist() == pytest.approx([1.0] * 4)
    assert pairs_44.fill_diagonal_(0).max() < 0.5


def check_same_bytes(one: Path, other: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


TRAINED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral-bf16": ("llama", "bf16", {}, {}),
    "qwen2-shared": (
        "qwen2", "fp32",
        {"moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32,
         "first_dense_layers": 1},
        {"method": "split_random", "rescale_at": "runtime"},
    ),
    "qwen3": ("qwen3", "fp32", {"router_order": "softmax_topk", "moe_layers": [1, 2]}, {}),
    "glm4-bf16": (
        "llama", "bf16",
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
         "moe_router_bias_update_rate": 0.05, "first_dense_layers": 1},
        {},
    ),
}  # fmt: skip


def quick(cases: dict[str, Any], *names: str) -> list[Any]:
    """Return the cases as parameters; all but ``names`` are slow."""
    return [pytest.param(case, marks=[] if case in names else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", quick(TRAINED, "qwen2-shared", "glm4-bf16"))
def test_a_trained_export_is_a_source_of_the_same_export(tmp_path: Path, case: str):
    family, precision, moe, upcycle = TRAINED[case]
    dense = save_dense(tmp_path / "dense", family)
    first = exported(
        tmp_path / "first", dense, steps=2, precision=precision,
        moe={"num_moe_experts": 4, **moe}, upcycle=upcycle,
    )  # fmt: skip
    again = exported(
        tmp_path / "again", first, layout="tp2-ep2", precision=precision,
        upcycle={"method": "keep", "verify": "always"},
    )  # fmt: skip
    check_same_bytes(first, again)
    receipt = json.loads((tmp_path / "again" / "run" / "receipt.json").read_text())
    assert receipt["against_dense"]["loss_moe"] == receipt["against_dense"]["loss_dense"]


STEPS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "olmoe-keep": ("olmoe", "tp2-ep2-etp2", {}, {"method": "keep"}),
    "qwen2-noise": (
        "qwen2_moe", "tp2-ep2", {"num_moe_experts": 8}, {"method": "grow", "noise_std": 0.02}
    ),
    "mixtral-bias": (
        "mixtral", "pp2", {"num_moe_experts": 8}, {"method": "grow", "twins": "bias"}
    ),
    "mixtral-exact": (
        "mixtral", "ep2", {"num_moe_experts": 8}, {"method": "grow", "twins": "exact"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", quick(STEPS, "olmoe-keep", "qwen2-noise"))
def test_five_steps_equal_those_of_one_rank(tmp_path: Path, case: str):
    """Tolerances are those of test_invariance.py: fp32 sums in another order, five AdamW steps."""
    family, layout, moe, upcycle = STEPS[case]
    source, tokens = save_moe(tmp_path / "source", family), write_tokens(tmp_path / "tokens")
    lines = {}
    for name in ("1", layout):
        world_size, parallel = LAYOUTS[name]
        settings = tree(tmp_path / name, source, tokens, parallel=parallel, upcycle=upcycle)
        settings["moe"] = moe
        lines[name] = run_training(complete_from_source(settings), world_size=world_size)
    assert [line["step"] for line in lines[layout]] == [0, 1, 2, 3, 4, 5]
    for ours, expected in zip(lines[layout][1:], lines["1"][1:], strict=True):
        assert ours["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)

    if upcycle["method"] != "keep":
        return
    for file in source.iterdir():  # a resume takes nothing from the source
        file.unlink()
    world_size, parallel = LAYOUTS[layout]
    settings = tree(tmp_path / "1", source, tokens, parallel=parallel, upcycle=upcycle)
    settings |= {"moe": moe, "train": settings["train"] | {"steps": 6}}
    config = with_source(build(RunConfig, complete_from_source(settings)))
    resumed = run_training(config.model_dump(mode="json"), world_size=world_size)
    assert resumed[-1]["step"] == 6


@pytest.mark.parametrize(
    "family", ["mixtral", pytest.param("olmoe", marks=pytest.mark.slow), "glm4_moe"]
)
def test_exact_growth_is_pruned_back_to_the_same_bits(tmp_path: Path, family: str):
    source = save_moe(tmp_path / "source", family)
    kept = exported(tmp_path / "kept", source, upcycle={"method": "keep"})
    grown = exported(
        tmp_path / "grown", source, layout="ep2", moe={"num_moe_experts": 8},
        upcycle={"method": "grow", "twins": "exact"},
    )  # fmt: skip
    assert json.loads((grown / "config.json").read_text())["num_experts_per_tok"] == 4
    check_similarities(tmp_path / "grown" / "run", source)
    pruned = exported(
        tmp_path / "pruned", grown, moe={"num_moe_experts": 4, "moe_router_topk": 2},
        upcycle={"method": "prune", "choose": "even"},
    )  # fmt: skip
    check_same_bytes(kept, pruned)


@pytest.mark.parametrize("family", ["qwen2_moe", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_an_export_of_finer_experts_is_the_source(tmp_path: Path, family: str):
    """1e-5 of the largest logit as in test_moe_source.py: fp32 sums in another order."""
    source = save_moe(tmp_path / "source", family)
    finer = exported(
        tmp_path / "finer", source, layout="ep2", moe={"num_moe_experts": 16},
        upcycle={"method": "split_random"},
    )  # fmt: skip
    assert json.loads((finer / "config.json").read_text())["moe_intermediate_size"] == 8
    tokens = torch.randint(0, 257, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, ours = (
            load_model(folder, device="cpu", dtype=torch.float32)(tokens).logits
            for folder in (source, finer)
        )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
