"""Scores of experts, against transformers with hooks; plans that `construct` writes from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import LAYOUTS
from ranks import run_on_ranks
from tiny import save_moe
from training_runs import run_training, tree, write_tokens
from transformers import AutoModelForCausalLM

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.file import read_plan
from megatron_moe.experts.from_source import complete_from_source
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.experts.reuse import by_score
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
SAMPLES, LENGTH = 4, 32
CHOICES = ("load", "utility", "reap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("choose")
    changes = {"num_hidden_layers": 2, "hidden_size": 32, "mlp_only_layers": [0]}
    save_moe(root / "source", "qwen2_moe", **changes)
    write_tokens(root / "tokens")
    return root


def config_of(folder: Path, run: Path, layout: str, moe: int, **upcycle: Any) -> RunConfig:
    settings = tree(
        run, folder / "source", folder / "tokens", parallel=LAYOUTS[layout][1],
        moe={"num_moe_experts": moe},
        upcycle={"plan": str(run / "plan.safetensors"), **upcycle},
        measure={"samples": SAMPLES, "interval": 1},
        train={"steps": 0, "global_batch_size": 4, "precision": "fp32"},
    )  # fmt: skip
    return build(RunConfig, complete_from_source(settings))


@pytest.mark.parametrize("layout", ["1", "tp2-ep2-etp2", "pp2"])
def test_scores_are_those_of_transformers(folder: Path, tmp_path: Path, layout: str):
    config = config_of(folder, tmp_path, layout, 2, method="prune", choose="reap")
    run_on_ranks(measure, config, tmp_path, world_size=LAYOUTS[layout][0])
    found = np.load(tmp_path / "scores.npz")
    expected = oracle(folder / "source", torch.from_numpy(found["tokens"]))
    for choose in CHOICES:
        ours, theirs = found[choose][1], expected[choose]
        # Sums of 64 products in fp32, in another order; the loss of a run has another unit.
        np.testing.assert_allclose(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-4)
        assert not found[choose][0].any(), "layer 0 has no experts"


def measure(world: World, config: RunConfig, out: Path) -> None:
    from megatron_moe.commands import construct as command
    from megatron_moe.construct.measure import calibration_batch
    from megatron_moe.construct.measure_experts import ExpertMeasurement
    from megatron_moe.construct.partial import PartialFiles
    from megatron_moe.data.texts import open_texts
    from megatron_moe.source.open import open_source

    source = open_source(config.source.path)
    texts = list(open_texts(config, vocab_size=source.spec.vocab_size).training.values())
    job = command._Construction(config, world, source, texts, out / "plan.safetensors", key="")
    model, as_source, groups = job.source_model()
    measurement = ExpertMeasurement(model, as_source, texts, groups, gradients=True)
    measurement.run(PartialFiles(out / "partial", "key"), lambda done, total: None)
    scores = {choose: measurement.scores(choose) for choose in CHOICES}
    batches = [calibration_batch(texts, index) for index in range(SAMPLES)]
    tokens = torch.cat([torch.cat([b.tokens_BS, b.labels_BS[:, -1:]], dim=1) for b in batches])
    if world.rank == 0:
        np.savez(out / "scores.npz", tokens=tokens.numpy(), **scores)


def oracle(source: Path, tokens_NS: torch.Tensor) -> dict[str, np.ndarray]:
    """Load, utility and REAP's score of the experts of layer 1, from their definitions."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    mlp, seen = model.model.layers[1].mlp, {}
    mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    mlp.gate.register_forward_hook(lambda _, __, result: seen.update(choice=result))
    mlp.register_forward_hook(lambda _, __, result: seen.update(out=result))
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in ("load", "norm", "utility")}
    for tokens_S in tokens_NS:
        logits_SV = model(tokens_S[None, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits_SV, tokens_S[1:], reduction="sum")
        (gradient_TD,) = torch.autograd.grad(loss, seen["out"])
        x_TD, gradient_TD = seen["x"].flatten(0, 1), gradient_TD.flatten(0, 1)
        _, weights_TK, chosen_TK = seen["choice"]
        for expert in range(4):
            token, k = (chosen_TK == expert).nonzero(as_tuple=True)
            gate, up = (x_TD[token] @ mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            output = torch.nn.functional.silu(gate) * up @ mlp.experts.down_proj[expert].T
            part = (output * weights_TK[token, k, None]).detach().double()
            sums["load"][expert] += len(token)
            sums["norm"][expert] += part.norm(dim=-1).sum()
            sums["utility"][expert] += (part * gradient_TD[token]).sum(dim=-1).abs().sum()
    return {
        "load": sums["load"].numpy(),
        "utility": sums["utility"].numpy(),
        "reap": (sums["norm"] / sums["load"]).numpy(),
    }


@pytest.mark.parametrize(
    ("method", "choose", "experts", "layout"),
    [("grow", "load", 6, "ep2"), ("prune", "reap", 2, "tp2-ep2")],
)
def test_a_run_takes_the_experts_that_construct_chose(
    folder: Path, tmp_path: Path, method: str, choose: str, experts: int, layout: str
):
    config = config_of(folder, tmp_path, layout, experts, method=method, choose=choose)
    world_size = LAYOUTS[layout][0]
    run_on_ranks(construct, config, world_size=world_size)
    run_on_ranks(measure, config, tmp_path, world_size=world_size)
    score_O = np.load(tmp_path / "scores.npz")[choose][1]
    spec = read_spec(config.source.path)
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    assert config.upcycle.plan is not None
    expert_E = read_plan(config.upcycle.plan, plan, source=None).layer(1).expert_E
    assert expert_E is not None
    best = by_score(score_O, 6) if method == "grow" else np.sort(np.argsort(-score_O)[:2])
    assert expert_E.tolist() == best.tolist()
    run_training(config.model_dump(mode="json"), world_size=world_size)


def construct(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.construct import construct

    construct(config, world)
