"""A teacher adds its losses to the step, under every layout, and leaves when its time is over.

The oracle of losses and gradients is transformers in float64: the exported model, the dense model,
and the loss written out. The oracle of layouts is one rank, that of a resumed run an uninterrupted
one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layouts import changes
from ranks import run_on_ranks
from tiny import save_dense, save_moe
from training_runs import Runs, make_runs, run_training, tree

from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.from_source import complete_from_source
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.load import load_model
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
SPLIT = {
    "moe": {"num_moe_experts": 4, "moe_ffn_hidden_size": 24,
            "moe_router_load_balancing_type": "none"},
    "upcycle": {"method": "split_random", "rescale": "N/K", "verify": "never"},
}  # fmt: skip
TEACHER = {"logits_weight": 0.7, "layers_weight": 0.5, "router_weight": 0.3, "temperature": 2.0}
LOSSES = ("loss/lm", "loss/teacher_logits", "loss/teacher_layers", "loss/teacher_router")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("teacher"), common=SPLIT, tie_word_embeddings=True)


# ---- one step against float64 --------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "moe", "full"])
def test_losses_and_gradients_are_those_of_the_formula(runs: Runs, recompute: str):
    """fp32 against float64, in a model of four layers: 1e-4 of the largest gradient."""
    where = f"formula-{recompute}"
    runs.train(where, train={"steps": 0})
    export_checkpoint(runs.root / where, runs.root / f"{where}-hf")
    train = {"steps": 2, "global_batch_size": 2, "recompute": recompute}
    settings = runs.settings(f"{where}-step", train=train, teacher=TEACHER)
    run_on_ranks(
        check_step, build(RunConfig, settings), runs.root / f"{where}-hf", world_size=1
    )  # fmt: skip


def check_step(world: World, config: RunConfig, exported: Path) -> None:
    from megatron_moe.commands.job import Job
    from megatron_moe.commands.teaching import open_teacher
    from megatron_moe.commands.upcycling import empty_model
    from megatron_moe.data.batches import make_batch
    from megatron_moe.data.samples import Sample
    from megatron_moe.model.upcycle import upcycle
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.runtime.engine import engine_of
    from megatron_moe.source.open import open_source
    from megatron_moe.train.guard import StepGuard
    from megatron_moe.train.state import make_state
    from megatron_moe.train.step import train_step

    nothing: Any = None
    layout, groups = create_groups(config.parallel, seed=0)
    engine = engine_of("torch", world)
    job = Job(config, world, engine, layout, groups, nothing, nothing)
    source = open_source(config.source.path)
    plan = make_expert_plan(source.spec, config.moe, config.upcycle)
    model = empty_model(job, source.spec, plan)
    upcycle(model, source, plan, layout=layout, rank=0)
    state = make_state(config, model, groups)

    generator = torch.Generator().manual_seed(0)
    length = config.data.seq_length
    ids = torch.randint(0, source.spec.vocab_size, (2, length + 1), generator=generator).numpy()
    mask = torch.ones(length)
    mask[: length // 4] = 0  # as in a conversation: the logits' loss counts what the other does
    positions = torch.arange(length).numpy()
    batches = [make_batch([Sample(row, mask.numpy(), positions)]) for row in ids]
    gradients: dict[str, torch.Tensor] = {}

    def keep(stage: str) -> None:
        if stage == "optimizer":
            for name, parameter in model.modules[0].named_parameters():
                gradients[name] = parameter.main_grad.clone()

    result = train_step(
        state, batches, config, groups, guard=StepGuard(config.guard), at=keep,
        teacher=open_teacher(job, plan),
    )  # fmt: skip
    losses, exact = formula(
        exported, config, torch.from_numpy(ids), mask, [plan.layer(i).neurons_EM for i in range(4)]
    )
    for name, loss in result.teacher.items():
        assert loss == pytest.approx(losses[name], rel=1e-5), name
    assert result.lm_loss == pytest.approx(losses["lm"], rel=1e-5)
    for ours, theirs in COMPARED.items():
        largest = float(exact[theirs].abs().max())
        assert largest > 0
        torch.testing.assert_close(
            gradients[ours].double(), exact[theirs], rtol=0, atol=1e-4 * largest, msg=ours
        )  # fmt: skip


COMPARED = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    **{f"decoder.layers.{i}.mlp.router.weight": f"model.layers.{i}.mlp.gate.weight"
       for i in range(4)},
    **{f"decoder.layers.{i}.self_attention.linear_proj.weight":
       f"model.layers.{i}.self_attn.o_proj.weight" for i in range(4)},
}  # fmt: skip


def formula(
    exported: Path, config: RunConfig, ids: torch.Tensor, mask: torch.Tensor, neurons: list[Any]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The four losses, and the gradients of their weighted sum, in float64."""
    moe = load_model(exported, device="cpu", dtype=torch.float64)
    moe.set_experts_implementation("eager")  # grouped_mm does not support float64
    dense = load_model(config.source.path, device="cpu", dtype=torch.float64)
    layers, routers = [], []

    def compare_layer(i: int) -> Any:
        mlp = dense.model.layers[i].mlp

        def hook(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            x = inputs[0].detach()
            act = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            target = mlp.down_proj(act).detach()
            error = (output - target).square().sum(dim=-1) / target.square().sum(dim=-1)
            layers.append(error.mean())
            own = [act[..., n] @ mlp.down_proj.weight[:, n].T for n in neurons[i]]
            share = torch.stack([(y * target).sum(dim=-1) for y in own], dim=-1).clamp_min(0)
            share = (share / share.sum(dim=-1, keepdim=True)).detach()
            logits = F.linear(inputs[0], module.gate.weight).log_softmax(dim=-1)
            routers.append((torch.xlogy(share, share) - share * logits).sum(dim=-1).mean())

        return hook

    for i, layer in enumerate(moe.model.layers):
        layer.mlp.register_forward_hook(compare_layer(i))
    logits, heat = moe(ids[:, :-1]).logits, config.teacher.temperature
    taught = dense(ids[:, :-1]).logits.detach()
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    divergence = F.kl_div(
        (logits / heat).log_softmax(-1), (taught / heat).log_softmax(-1), log_target=True,
        reduction="none",
    ).sum(dim=-1)  # fmt: skip
    count = mask.expand(2, -1).flatten().double()
    losses = {
        "lm": (each * count).sum() / count.sum(),
        "logits": heat**2 * (divergence.flatten() * count).sum() / count.sum(),
        "layers": torch.stack(layers).mean(),
        "router": torch.stack(routers).mean(),
    }
    weights = {"lm": 1.0} | {name: TEACHER[f"{name}_weight"] for name in list(losses)[1:]}
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    total.backward()
    return {name: float(loss) for name, loss in losses.items()}, {
        name: parameter.grad
        for name, parameter in moe.named_parameters()
        if parameter.grad is not None
    }


# ---- layouts, resuming, the end of teaching ------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank(runs: Runs) -> list[dict[str, Any]]:
    return runs.train("one", teacher={**TEACHER, "steps": 4})


LAYOUTS = [
    "tp2 ep2", "pp2 vpp2 recompute-full", "dp2 ep2 recompute-moe", "cp2",
    pytest.param("tp2 dp2 ep2 etp2", marks=pytest.mark.slow),
    pytest.param("tp2 pp2 ep2 recompute-full", marks=pytest.mark.slow),
    pytest.param("pp2 first-1", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_teaches_as_one_rank(runs: Runs, one_rank: list[dict[str, Any]], layout: str):
    """fp32 sums in another order; differences of 1e-7 grow over five steps to about 1e-6."""
    lines = runs.train(layout, layout=layout, teacher={**TEACHER, "steps": 4})
    compare(lines, one_rank)


def compare(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines[1:], expected[1:], strict=True):
        assert line.keys() == other.keys()
        for name in {*LOSSES, "grad_norm"} & line.keys():
            assert line[name] == pytest.approx(other[name], rel=2e-5), (line["step"], name)


def test_the_teacher_leaves_after_its_last_step(one_rank: list[dict[str, Any]]):
    assert all(name in line for line in one_rank[1:5] for name in LOSSES)
    assert not any(name in one_rank[5] for name in LOSSES[1:])


def test_a_resumed_run_is_taught_as_an_uninterrupted_one(
    runs: Runs, one_rank: list[dict[str, Any]]
):
    """It resumes under another layout after three steps; after five, it needs no teacher."""
    teacher, optimizer = {**TEACHER, "steps": 4}, {"lr_decay_steps": 5}
    runs.train("resumed", layout="dp2", teacher=teacher, train={"steps": 3}, optimizer=optimizer)
    lines = runs.train("resumed", layout="pp2", teacher=teacher, optimizer=optimizer)
    compare(lines, one_rank)


def test_copies_agree_with_their_teacher(runs: Runs):
    """Copies compute the dense layer: divergence and errors are rounding, observed 1e-12, 1e-12."""
    exact = {"moe": {"moe_ffn_hidden_size": None}, "upcycle": {"method": "copy", "rescale": None}}
    teacher = {"logits_weight": 1.0, "layers_weight": 1.0}
    _, first, *_ = runs.train("copies", **exact, teacher=teacher, train={"steps": 2})
    assert abs(first["loss/teacher_logits"]) < 1e-6
    assert first["loss/teacher_layers"] < 1e-9


@pytest.mark.parametrize("layout", ["1", "pp2 vpp2", "tp2 ep2"])
def test_another_model_teaches_logits(runs: Runs, layout: str):
    """The oracle of the first step's divergence is transformers, on the tokens of the step."""
    larger = runs.root / "larger"
    if not larger.exists():
        save_dense(larger, "qwen3", seed=1, hidden_size=128, head_dim=16)
    teacher = {"path": str(larger), "logits_weight": 1.0}
    batch = {"steps": 2, "global_batch_size": 2, "micro_batch_size": 1}
    lines = runs.train(f"larger-{layout}", layout=layout, teacher=teacher, train=batch)
    alone = runs.train("larger-alone", teacher=teacher, train=batch)
    for line, other in zip(lines[1:], alone[1:], strict=True):
        for name in LOSSES[:2]:
            assert line[name] == pytest.approx(other[name], rel=1e-5)
    assert lines[1]["loss/teacher_logits"] > 0.1, "another model says something else"


def test_a_moe_teaches_its_own_copies(runs: Runs):
    source = save_moe(runs.root / "mixtral", "mixtral")
    run_settings = complete_from_source(
        tree(
            runs.root / "grown", source, runs.tokens, moe={"num_moe_experts": 8},
            upcycle={"method": "grow", "twins": "exact"}, teacher={"logits_weight": 1.0},
            train={"steps": 3},
        )
    )  # fmt: skip
    lines = run_training(run_settings, world_size=1)
    assert abs(lines[1]["loss/teacher_logits"]) < 1e-5, "exact growth computes the source"
    assert lines[3]["loss/teacher_logits"] > 1e-5, "the teacher does not move with the model"


def test_stages_keep_the_teacher(runs: Runs):
    """A stage builds the model anew. The oracle is another layout, with the same stages."""
    stages = [{"steps": 2, "freeze": ["attention", "embeddings"]}, {"freeze": []}]
    train = {"stages": stages, "steps": 4}
    lines = runs.train("stages", teacher=TEACHER, train=train)
    compare(runs.train("stages-ep2", layout="dp2 ep2", teacher=TEACHER, train=train), lines)
    assert all(name in line for line in lines[1:] for name in LOSSES)


@pytest.mark.parametrize("layout", ["1", "tp2 pp2", "pp2 vpp2"])
def test_a_rank_holds_its_part_of_the_teacher(runs: Runs, layout: str):
    settings = runs.settings(f"held-{layout}", layout, teacher=TEACHER)
    run_on_ranks(check_held, build(RunConfig, settings), world_size=changes(layout)[0])


def check_held(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.job import Job
    from megatron_moe.commands.teaching import open_teacher
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.planner.parameters import rank_parameters
    from megatron_moe.planner.shape import dense_shape
    from megatron_moe.planner.workload import degrees_of
    from megatron_moe.runtime.engine import engine_of

    nothing: Any = None
    layout, groups = create_groups(config.parallel, seed=0)
    job = Job(config, world, engine_of("torch", world), layout, groups, nothing, nothing)
    spec = read_spec(config.source.path)
    teacher = open_teacher(job, make_expert_plan(spec, config.moe, config.upcycle))
    parameters = [p for module in teacher.model.modules for p in module.parameters()]
    planned = rank_parameters(
        dense_shape(spec), degrees_of(config, gpus=world.size), pp_rank=groups.pp.rank()
    )
    assert sum(p.numel() for p in parameters) == sum(planned)
    assert not any(p.requires_grad for p in parameters), "a teacher has no gradients"


def test_a_resume_without_the_teachers_weights_says_what_to_do(runs: Runs):
    source = save_dense(runs.root / "removed", tie_word_embeddings=True)
    common = {"source": {"path": str(source)}, "teacher": {"logits_weight": 1.0, "steps": 3}}
    runs.train("without", **common, train={"steps": 2})
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the teacher \(.*removed\) .*steps up to 3 need it"):
        runs.train("without", **common, train={"steps": 4})
    lines = runs.train("without", source=common["source"], train={"steps": 4})
    assert lines[-1]["step"] == 4
