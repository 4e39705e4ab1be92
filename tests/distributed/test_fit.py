"""Fit routers and down matrices on ranks: the same plan everywhere, and the model it promises."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import MULTIPLIERS, save_dense
from torch.utils.flop_counter import FlopCounterMode
from training_runs import run_training, tree, write_tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_moe.checkpoint.folder import step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.cli.main import app
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.report import report
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batches import validation_batches
from megatron_moe.data.texts import open_texts
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.experts.file import read_plan
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.experts.resolve import make_recipe
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.construction import construction_cost
from megatron_moe.rules.check import violations
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32}
SAMPLES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fit")
    save_dense(root / "dense", num_hidden_layers=3, hidden_size=32, vocab_size=257)
    write_tokens(root / "tokens")
    return root


def settings(folder: Path, run: Path, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "moe": {**MOE, "moe_layers": [0, 2]},
        "upcycle": {"method": "split_random", "plan": str(run / "plan.safetensors"),
                    "fit": ["router", "down"], "verify": "never"},
        "measure": {"samples": SAMPLES},
        "train": {"steps": 0, "global_batch_size": 4, "precision": "fp32"},
    }  # fmt: skip
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return build(RunConfig, tree(run, folder / "dense", folder / "tokens", **sections))


def construct_on(config: RunConfig, world_size: int) -> None:
    config.run.dir.mkdir(parents=True, exist_ok=True)
    run_on_ranks(_construct, config, world_size=world_size)


def _construct(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.construct import construct

    construct(config, world)


@pytest.fixture(scope="module")
def fitted(folder: Path) -> RunConfig:
    config = settings(folder, folder / "one")
    construct_on(config, 1)
    return config


def tables(config: RunConfig) -> dict[str, torch.Tensor]:
    assert config.upcycle.plan is not None
    plan = config.upcycle.plan
    result = load_file(plan)
    for file in sorted(plan.with_suffix(".down").iterdir()):
        result |= {f"{file.stem}.{name}": value for name, value in load_file(file).items()}
    return result


def assert_same_plan(one: RunConfig, other: RunConfig) -> None:
    ours, theirs = tables(one), tables(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4, "two MoE layers: router rows and down matrices"
    for name in ours:
        # Sums of float64 products of fp32 activations, in another order.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_any_number_of_ranks_gives_the_same_plan(folder: Path, fitted: RunConfig, tmp_path: Path):
    other = settings(folder, tmp_path, parallel={"tensor_parallel_size": 2})
    construct_on(other, 4)
    assert_same_plan(fitted, other)


def test_an_interrupted_fit_resumes(folder: Path, fitted: RunConfig, tmp_path: Path):
    config = settings(folder, tmp_path)
    with pytest.raises(Exception, match="killed"):
        run_on_ranks(_killed_after_one_layer, config, world_size=2)
    left = tmp_path / ".plan.safetensors.fitting"
    assert sorted(file.name for file in left.iterdir()) == [
        "00000.json", "00000.safetensors", "key",
    ]  # fmt: skip
    written = (left / "00000.safetensors").stat().st_mtime_ns
    construct_on(config, 2)
    left = tmp_path / "plan.down"
    assert (left / "00000.safetensors").stat().st_mtime_ns == written, "it was not solved again"
    assert [file.suffix for file in sorted(left.iterdir())] == [".safetensors"] * 2
    assert_same_plan(fitted, config)


def test_a_finished_plan_is_not_made_again(folder: Path, tmp_path: Path, capfd: Any):
    """Nor lost: other settings replace it, and what is damaged is made again."""
    config = settings(folder, tmp_path, upcycle={"fit": ["router"]})
    plan = tmp_path / "plan.safetensors"
    construct_on(config, 1)
    written, told = plan.stat().st_mtime_ns, capfd.readouterr().out
    construct_on(config, 2)
    assert plan.stat().st_mtime_ns == written
    again = capfd.readouterr().out
    assert f"{plan} is there: plan {told.split('plan ')[-1].split()[0]}, made with these" in again
    with pytest.raises(Exception, match="killed"):
        run_on_ranks(_killed_after_one_layer, settings(folder, tmp_path), world_size=1)
    assert f"{plan} was made with other settings" in capfd.readouterr().out
    assert plan.stat().st_mtime_ns == written, "the old plan is there until the new one is whole"
    plan.write_bytes(plan.read_bytes()[:-1])
    construct_on(config, 1)
    assert "The plan is constructed again" in capfd.readouterr().out


def _killed_after_one_layer(world: World, config: RunConfig) -> None:
    from megatron_moe.construct.stream import LayerStream

    load = LayerStream.load

    def killed(stream: LayerStream, layer: int) -> None:
        if layer == 1:
            raise RuntimeError("killed")
        load(stream, layer)

    LayerStream.load = killed
    config.run.dir.mkdir(parents=True, exist_ok=True)
    _construct(world, config)


def test_the_receipt_of_a_fit_says_what_it_gained(folder: Path, fitted: RunConfig, tmp_path: Path):
    from safetensors import safe_open

    with safe_open(fitted.upcycle.plan, "np") as file:  # pyright: ignore
        header = json.loads(file.metadata()["megatron_moe.expert_plan"])
    fits = header["measured_on"]["fit"]
    written = settings(folder, tmp_path)
    written = written.model_copy(update={"upcycle": fitted.upcycle})
    run_training(written.model_dump(mode="json"), world_size=1)
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["construction"] == header["measured_on"]
    assert "Fit on calibration text that was left out" in report(tmp_path).read_text()
    assert fits.keys() == {"0", "2"}
    for fit in fits.values():
        assert fit["error_after"] < fit["error_before"]
        assert fit["max_load"] == max(fit["load_E"]) <= 1.5
        assert np.isclose(np.mean(fit["load_E"]), 1)


LAYOUTS = {
    "1": (1, {}),
    "tp2-ep2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "etp2-pp1": (2, {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "ep4": (4, {"expert_parallel_size": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_the_solution(
    folder: Path, fitted: RunConfig, tmp_path: Path, layout: str
):
    """The oracle computes the MoE layers by hand in transformers' dense model."""
    world_size, parallel = LAYOUTS[layout]
    config = settings(folder, tmp_path, parallel=parallel)
    config = config.model_copy(update={"upcycle": fitted.upcycle})
    assert not violations(config, read_spec(folder / "dense"), world_size)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    run_on_ranks(_logits, config, tmp_path / "logits.pt", world_size=world_size)
    ids_S, logits_SV = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits_SV, by_hand(folder, fitted, ids_S), rtol=1e-3, atol=1e-3)


OTHERS = {  # method, order of the router, neurons of the shared expert
    "clustered": ("split_clustered", "softmax_topk", 32),
    "inner": ("sharing_inner", "topk_softmax", None),
    "inter": ("sharing_inter", "softmax_topk", 32),
    "weaver": ("weaver", "topk_softmax", 32),
    "routed": ("split_routed", "softmax_topk", 32),
}


@pytest.mark.parametrize("case", OTHERS)
def test_every_method_that_splits_can_be_solved_for(folder: Path, tmp_path: Path, case: str):
    """For these experts and both orders of the router, the run computes what was solved for."""
    method, order, shared = OTHERS[case]
    moe = {"router_order": order, "moe_shared_expert_intermediate_size": shared}
    config = settings(folder, tmp_path, moe=moe, upcycle={"method": method})
    assert not violations(config, read_spec(folder / "dense"), 1)
    construct_on(config, 1)
    run_on_ranks(_logits, config, tmp_path / "logits.pt", world_size=1)
    ids_S, logits_SV = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits_SV, by_hand(folder, config, ids_S), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("shared", "architecture"), [(32, "Qwen2MoeForCausalLM"), (None, "MixtralForCausalLM")]
)
def test_an_export_is_plain_and_scores_what_the_trainer_reports(
    folder: Path, tmp_path: Path, shared: int | None, architecture: str
):
    """Step 0 of a solved model under ep 2, on held-out text, and its export in transformers."""
    moe = {"moe_layers": "all" if shared is None else [0, 2],
           "moe_ffn_hidden_size": 24 if shared is None else 16,
           "moe_shared_expert_intermediate_size": shared}  # fmt: skip
    config = settings(
        folder, tmp_path, moe=moe, upcycle={"method": "split_routed"},
        parallel={"expert_parallel_size": 2},
        data={"validation_path": str(folder / "tokens"), "validation_samples": 6},
    )  # fmt: skip
    assert not violations(config, read_spec(folder / "dense"), 2)
    construct_on(config, 2)
    line = run_training(config.model_dump(mode="json"), world_size=2)[-1]
    assert export_checkpoint(tmp_path, tmp_path / "hf") == architecture
    assert "| solved for on text | down, router |" in (tmp_path / "hf" / "README.md").read_text()
    run_on_ranks(_loss_of_an_export, config, tmp_path / "hf", world_size=1)
    expected = float((tmp_path / "hf" / "loss").read_text())
    # fp32 sums in another order
    assert line["loss/validation"] == pytest.approx(expected, abs=2e-5)
    if shared is not None:
        assert_evaluated(tmp_path, expected)


def assert_evaluated(run: Path, expected: float) -> None:
    """The model at step 0 is built again from the solved matrices, or it is left out."""
    result = CliRunner().invoke(app, ["evaluate", str(run), "--json"])
    assert result.exception is None, result.exception
    ours = json.loads((run / "evaluation" / "step-000000.json").read_text())
    for model in ("domains", "step_0"):
        (figures,) = ours[model].values()
        assert figures["loss"] == pytest.approx(expected, abs=2e-5), model
    shutil.rmtree(run / "plan.down")
    result = CliRunner().invoke(app, ["evaluate", str(run), "--json"])
    ours = json.loads((run / "evaluation" / "step-000000.json").read_text())
    assert ours["step_0"] is None
    assert "restore the folder next to the plan file" in str(ours["remarks"])


def _loss_of_an_export(world: World, config: RunConfig, exported: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    (text,) = open_texts(config, vocab_size=257).validation.values()
    losses = []
    for batch in validation_batches(text, num_samples=6, micro_batch_size=1, dp_rank=0, dp_size=1):
        with torch.no_grad():
            logits_SV = model(batch.tokens_BS).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits_SV, batch.labels_BS[0]))
    (exported / "loss").write_text(str(float(torch.stack(losses).mean())))


@pytest.mark.parametrize(
    ("moe", "names"),
    [
        ({"router_order": "softmax_topk"}, "moe.router_order"),
        ({"moe_router_topk": 3}, "moe.moe_router_topk"),
        ({"moe_router_score_function": "sigmoid"}, "moe.moe_router_score_function"),
    ],
)
def test_a_plan_is_for_the_routing_that_it_was_solved_with(
    folder: Path, fitted: RunConfig, moe: dict[str, Any], names: str
):
    config, spec = settings(folder, folder / "another", moe=moe), read_spec(folder / "dense")
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    assert fitted.upcycle.plan is not None
    with pytest.raises(CheckpointError, match=f"{names}.*the file has"):
        read_plan(fitted.upcycle.plan, plan, source=None)


def test_a_sequence_that_would_fit_and_judge_is_refused(folder: Path, tmp_path: Path):
    config = settings(folder, tmp_path, measure={"samples": 188})
    with pytest.raises(ConfigError, match=r"samples \(188\) .*at most 187: text text has 187"):
        construct_on(config, 1)
    assert not list(tmp_path.glob("*.down"))


def test_matrices_of_an_earlier_plan_are_not_used(folder: Path, fitted: RunConfig, tmp_path: Path):
    """The plan file was constructed again without down; its neighbor folder is still there."""
    weights = []
    for name in ("alone", "beside"):
        config = settings(folder, tmp_path / name, upcycle={"fit": ["router"]})
        construct_on(config, 1)
        assert config.upcycle.plan is not None
        if name == "beside":
            source = fitted.upcycle.plan.with_suffix(".down")  # pyright: ignore
            shutil.copytree(source, config.upcycle.plan.with_suffix(".down"))
        run_training(config.model_dump(mode="json"), world_size=1)
        with GlobalTensors(step_folder(tmp_path / name, 0)) as saved:
            key = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"
            weights.append(saved.read(key, index=None, dtype=torch.float32))
    assert torch.equal(*weights)


@pytest.mark.parametrize("method", ["weaver", "split_clustered"])
def test_a_router_alone_can_be_fitted(folder: Path, tmp_path: Path, method: str):
    """The run begins with the fitted rows, whatever rows the method has by default."""
    config = settings(folder, tmp_path, upcycle={"method": method, "fit": ["router"]})
    construct_on(config, 1)
    assert config.upcycle.plan is not None
    rows = load_file(config.upcycle.plan)
    run_training(config.model_dump(mode="json"), world_size=1)
    with GlobalTensors(step_folder(tmp_path, 0)) as saved:
        for layer in (0, 2):
            key = f"decoder.layers.{layer}.mlp.router.weight"
            weights_ED = saved.read(key, index=None, dtype=torch.float32)
            assert torch.equal(weights_ED, rows[f"layers.{layer}.router_ED"])


def _logits(world: World, config: RunConfig, out: Path) -> None:
    from megatron_moe.construct.complete import complete_plan
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.hf.reader import open_safetensors
    from megatron_moe.model.build import build_model
    from megatron_moe.model.upcycle import upcycle
    from megatron_moe.model.verify import _moe_logits
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.runtime.engine import TORCH_ON_CPU

    layout, groups = create_groups(config.parallel, seed=0)
    dense = open_safetensors(config.source.path)
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    plan = complete_plan(plan, config, dense)
    model = build_model(
        config, dense.spec, layout=layout, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    upcycle(model, dense, plan, layout=layout, rank=world.rank)
    ids_S = torch.arange(32) * 7 % 257
    with torch.no_grad():
        part_Sv = _moe_logits(model, ids_S, groups)
    assert part_Sv is not None
    parts = [torch.empty_like(part_Sv) for _ in range(groups.tp.size())]
    torch.distributed.all_gather(parts, part_Sv.contiguous(), group=groups.tp)
    if world.rank == 0:
        torch.save((ids_S, torch.cat(parts, dim=1)[:, : dense.spec.vocab_size]), out)


def by_hand(folder: Path, fitted: RunConfig, ids_S: torch.Tensor) -> torch.Tensor:
    """Put the plan's MoE layers into the dense model of transformers."""
    from megatron_moe.experts.file import read_plan
    from megatron_moe.experts.plan import make_expert_plan

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    plan = make_expert_plan(read_spec(folder / "dense"), fitted.moe, fitted.upcycle)
    assert fitted.upcycle.plan is not None
    plan = read_plan(fitted.upcycle.plan, plan, source=None)
    values = tables(fitted)
    for layer in (0, 2):
        mlp, neurons_EM = model.model.layers[layer].mlp, plan.layer(layer).neurons_EM
        router_ED = values[f"layers.{layer}.router_ED"]
        down_ND = values[f"{layer:05}.down_ND"]
        shared_S = torch.from_numpy(plan.layer(layer).shared_S)

        def moe(x, mlp=mlp, n=neurons_EM, r=router_ED, d=down_ND, s=shared_S):
            x_TD = x[0]
            act_TF = torch.nn.functional.silu(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
            logits_TE = x_TD @ r.T
            top_TK, chosen_TK = logits_TE.topk(2)
            weights_TK = top_TK.softmax(1)
            if fitted.moe.router_order == "softmax_topk":
                weights_TK = logits_TE.softmax(1).gather(1, chosen_TK)
            out_TD = act_TF[:, s] @ d[n.size :]
            for token in range(len(x_TD)):
                for weight, e in zip(weights_TK[token], chosen_TK[token], strict=True):
                    rows = d[e * n.shape[1] : (e + 1) * n.shape[1]]
                    out_TD[token] += weight * (act_TF[token, n[e]] @ rows)
            return out_TD[None]

        mlp.forward = moe
    with torch.no_grad():
        return model(ids_S[None]).logits[0]


def test_a_changed_matrix_is_noticed(folder: Path, fitted: RunConfig, tmp_path: Path):
    plan = tmp_path / "plan.safetensors"
    shutil.copy(fitted.upcycle.plan, plan)  # pyright: ignore
    shutil.copytree(fitted.upcycle.plan.with_suffix(".down"), plan.with_suffix(".down"))  # pyright: ignore
    file = plan.with_suffix(".down") / "00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    config = settings(folder, tmp_path / "run", upcycle={"plan": str(plan)})
    with pytest.raises(Exception, match=r"00002\.safetensors is damaged"):
        run_training(config.model_dump(mode="json"), world_size=1)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("granite", MULTIPLIERS), ("olmo2", {})]
)
def test_the_stream_of_layers_is_the_dense_model(
    tmp_path: Path, family: str, changes: dict[str, Any]
):
    """Hidden states between layers are those of transformers: norms, multipliers and all.

    1e-4 on hidden states of size 10: fp32 sums in another order.
    """
    save_dense(tmp_path / "dense", family, num_hidden_layers=3, **changes)
    write_tokens(tmp_path / "tokens")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids_S = torch.arange(32) * 7 % 257
    with torch.no_grad():
        result = model(ids_S[None], output_hidden_states=True)
    config = settings(tmp_path, tmp_path / "run")
    run_on_ranks(_stream, config, ids_S, result.hidden_states[2][0], world_size=1)


def _stream(world: World, config: RunConfig, ids_S: torch.Tensor, expected_SD: torch.Tensor):
    from megatron_moe.construct.dense_ffn import DenseFfn
    from megatron_moe.construct.stream import LayerStream
    from megatron_moe.data.batches import make_batch
    from megatron_moe.data.samples import Sample
    from megatron_moe.hf.reader import open_safetensors
    from megatron_moe.runtime.engine import TORCH_ON_CPU

    dense = open_safetensors(config.source.path)
    stream = LayerStream(config, dense, world.rank, TORCH_ON_CPU)
    ids_T = torch.cat([ids_S, ids_S[:1]]).numpy()
    batch = make_batch([Sample(ids_T, np.ones(len(ids_S), np.float32), np.arange(len(ids_S)))])
    with torch.no_grad():
        hidden_SBD = stream.embed(batch)
        for layer in range(2):
            stream.load(layer)
            residual_SBD = stream.attend(hidden_SBD, batch)
            output_TD = DenseFfn.read(dense, layer).output(stream.ffn_input(residual_SBD))
            hidden_SBD = residual_SBD + stream.added(output_TD).view_as(residual_SBD)
    assert (hidden_SBD[:, 0] - expected_SD).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["split_random", "split_coactivation", "split_routed"])
def test_the_planner_counts_what_a_fit_computes(folder: Path, tmp_path: Path, method: str):
    """Torch counts products; within 3%, the router's logits and what is left out of the count."""
    dense = save_dense(tmp_path / "dense", num_hidden_layers=2, hidden_size=96,
                       intermediate_size=768, vocab_size=257)  # fmt: skip
    moe = {"num_moe_experts": 4, "moe_ffn_hidden_size": 160,
           "moe_shared_expert_intermediate_size": 128}  # fmt: skip
    sections = {
        "source": {"path": str(dense)}, "moe": moe | {"moe_layers": "all"},
        "upcycle": {"method": method}, "data": {"seq_length": 64},
    }  # fmt: skip
    config = settings(folder, tmp_path / "run", **sections)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    counted = tmp_path / "flops"
    run_on_ranks(_counting, config, counted, world_size=1)
    cost = construction_cost(
        make_recipe(read_spec(dense), config.moe, config.upcycle), read_spec(dense),
        config.measure, seq_length=64, ranks=1,
    )  # fmt: skip
    assert cost.measuring + cost.fitting == pytest.approx(float(counted.read_text()), rel=0.05)


def _counting(world: World, config: RunConfig, out: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        _construct(world, config)
    out.write_text(str(counter.get_total_flops()))
