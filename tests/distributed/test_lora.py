"""Runs with adapters: frozen weights keep their bits, and W + alpha / R * B A is what is trained.

Oracles: torch.optim on the transformers model in float64, the gradients of a run without adapters,
one rank for other layouts, and transformers on the export.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization
from training_runs import Runs, make_runs, read_metrics
from transformers import AutoModelForCausalLM

from megatron_moe.analyze.similarity import layer_similarity
from megatron_moe.checkpoint.folder import plan_of, read_config, read_progress, step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.commands.export import export_checkpoint, has_adapters
from megatron_moe.data.samples import Samples
from megatron_moe.data.stream import TokenStream
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.whole_run import checkpoint_bytes
from megatron_moe.planner.workload import workload_of
from megatron_moe.report.page import run_page
from megatron_moe.report.read import read_run
from megatron_moe.source.open import open_source

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow
RANK, FACTOR = 4, 2.0
LORA = {"rank": RANK, "alpha": RANK * FACTOR, "targets": ["attention", "experts"]}
WITHOUT = {"rank": 0, "alpha": 32.0, "targets": ["attention"]}
COMMON: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "optimizer": {"warmup_steps": 0, "clip_grad": 1e9},
    "checkpoint": {"interval": 1, "keep": 100},
}
QKV, PROJ = "self_attention.linear_qkv.", "self_attention.linear_proj."
FC1, FC2 = "mlp.experts.experts.linear_fc1.", "mlp.experts.experts.linear_fc2."
IN, OUT = "adapter.linear_in.weight", "adapter.linear_out.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("lora"), "qwen2", COMMON, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With validation, and without a balancing loss, as transformers computes it."""
    common = {**COMMON, "moe": {"moe_aux_loss_coeff": 0.0}}
    return make_runs(tmp_path_factory.mktemp("lora-llama"), "llama", common)


@pytest.fixture(scope="module")
def start(runs: Runs) -> dict[str, Tensor]:
    """The weights before the first step."""
    runs.train("start", train={"steps": 0})
    return runs.tensors("start", 0)


def one_rank(runs: Runs) -> list[dict[str, Any]]:
    """Five steps on one rank, trained once."""
    if not (runs.root / "one").exists():
        runs.train("one")
    return read_metrics(runs.root / "one")


def assert_same_course(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """1e-5 and 1e-4 as in test_invariance.py."""
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for line, whole in zip(ours[1:], expected[1:], strict=True):
        assert line["loss/lm"] == pytest.approx(whole["loss/lm"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_adapters_start_as_the_model_without_them_to_the_last_bit(runs: Runs):
    validation = {"validation_path": str(runs.tokens), "validation_samples": 5}
    plain = runs.train("plain", data=validation, lora=WITHOUT)
    ours = runs.train("adapted", data=validation)
    assert ours[0] == plain[0]
    assert ours[1]["loss/lm"] == plain[1]["loss/lm"]
    assert ours[2]["loss/lm"] != plain[2]["loss/lm"]


def test_first_gradients_are_those_of_the_weight_times_the_other_factor(
    runs: Runs, start: dict[str, Tensor]
):
    """B has factor * dW A^T, and A has factor * B^T dW = 0; fp32 sums over 128 tokens: 1e-5."""
    runs.train("free", train={"steps": 1}, lora=WITHOUT)
    runs.train("first", train={"steps": 1})
    free, first = runs.tensors("free", 1), runs.tensors("first", 1)
    for layer in range(4):
        for linear in (QKV, PROJ, FC1, FC2):
            name = f"decoder.layers.{layer}.{linear}"
            a_RI, mean = start[name + IN].double(), "optimizer.exp_avg."
            expected = FACTOR * free[f"{mean}{name}weight"].double() @ a_RI.mT
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(
                first[f"{mean}{name}{OUT}"].double(), expected, rtol=0,
                atol=1e-5 * float(expected.abs().max()),
            )  # fmt: skip
            assert not first[f"{mean}{name}{IN}"].any()
            assert not start[name + OUT].any()
            bound = a_RI.shape[-1] ** -0.5
            assert 0.9 * bound < a_RI.abs().max() <= bound
    drawn = [row for key, value in start.items() if key.endswith(IN) for row in value.view(-1, 64)]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn), "not independent"


def test_weights_of_targets_keep_their_bits_and_take_no_state(runs: Runs, start: dict[str, Tensor]):
    one_rank(runs)
    end = runs.tensors("one", 5)
    targets = (".self_attention.", ".experts.")
    others = ("norm", ".adapter.")
    frozen = {
        key
        for key in start
        if any(one in key for one in targets) and not any(one in key for one in others)
    }
    assert len(frozen) == 4 * 5  # qkv with its bias, the output projection, fc1 and fc2
    for key in start:
        assert torch.equal(end[key], start[key]) == (key in frozen), key
        assert (f"optimizer.exp_avg.{key}" in end) == (key not in frozen), key
    config = read_config(step_folder(runs.root / "one", 5))
    shape = run_shape(config, read_spec(runs.source))
    assert checkpoint_bytes(shape, workload_of(config)) == 4 * sum(x.numel() for x in end.values())
    receipt = json.loads((runs.root / "one" / "receipt.json").read_text())
    assert receipt["frozen"] == ["attention", "experts"]
    assert receipt["lora"] == LORA
    assert "LoRA of rank 4" in str(run_page(read_run(runs.root / "one")))


QUICK = ["tp2 ep2 etp1", "pp2 vpp2 recompute-full", "dp2 ep2"]
THOROUGH = [
    "cp2", "tp2 dp2 ep4 etp1 replicated", "tp4 etp1", "tp2 pp2 ep2 etp1",
    "tp2 cp2 ep2 etp1 recompute-full", "dp2 ep2 recompute-moe",
]  # fmt: skip


@pytest.mark.parametrize("layout", [*QUICK, *(pytest.param(name, marks=slow) for name in THOROUGH)])
def test_a_layout_trains_as_one_rank(runs: Runs, layout: str):
    assert_same_course(runs.train(f"layout {layout}", layout=layout), one_rank(runs))


@slow
@pytest.mark.parametrize("layout", ["tp2 etp2", "tp2 dp2 ep2 etp2"])
def test_adapters_of_attention_alone_train_as_on_one_rank(runs: Runs, layout: str):
    """Experts are trained themselves, and may be sharded over etp."""
    lora = {"targets": ["attention"], "rank": RANK, "alpha": 8.0}
    if not (runs.root / "attention").exists():
        runs.train("attention", lora=lora)
    ours = runs.train(f"attention {layout}", layout=layout, lora=lora)
    assert_same_course(ours, read_metrics(runs.root / "attention"))


@slow
def test_adapters_alone_train_as_on_one_rank(runs: Runs):
    """The first stage begins with frozen parameters, and its layers are recomputed."""
    train: dict[str, Any] = {"freeze": ["embeddings", "norms", "router"]}
    expected = runs.train("alone", train=train)
    train["recompute"] = "full"
    assert_same_course(runs.train("alone pp", layout="tp2 pp2 dp2 ep2", train=train), expected)


@slow
def test_more_tp_ranks_than_query_groups_train_as_one_rank(tmp_path: Path):
    runs = make_runs(tmp_path, "qwen3", COMMON, num_key_value_heads=1)
    assert_same_course(runs.train("tp2", layout="tp2 etp1"), one_rank(runs))


@pytest.mark.parametrize(
    ("before", "after"),
    [("tp2 etp1", "pp2"), pytest.param("1", "tp2 dp2 ep2 etp1", marks=slow)],
)
def test_a_run_resumed_under_another_layout_is_the_uninterrupted_one(
    runs: Runs, before: str, after: str
):
    where = f"resumed {before} {after}"
    runs.train(where, layout=before)
    (runs.root / where / "checkpoints" / "latest").write_text("step_00000002\n")
    assert_same_course(runs.train(where, layout=after), one_rank(runs))


def test_a_bf16_run_resumes_to_the_last_bit(runs: Runs):
    train = {"train": {"precision": "bf16", "steps": 4}}
    whole = runs.train("bf16", layout="tp2 ep2 etp1", **train)
    (runs.root / "bf16" / "checkpoints" / "latest").write_text("step_00000002\n")
    again = runs.train("bf16", layout="tp2 ep2 etp1", **train)
    for name in ("loss/lm", "grad_norm"):
        assert [line[name] for line in again[1:]] == [line[name] for line in whole[1:]]


def test_adapters_are_a_role(runs: Runs, start: dict[str, Tensor]):
    """They can be frozen for a stage, and have a learning rate of their own."""
    stages = [{"steps": 1, "freeze": ["adapters"]}, {}]
    optimizer = {"lr_multipliers": {"adapters": 10.0}, "lr_decay_style": "constant",
                 "weight_decay": 0.0}  # fmt: skip
    runs.train("role", layout="dp2", train={"steps": 2, "stages": stages}, optimizer=optimizer)
    first, second = (runs.tensors("role", step) for step in (1, 2))
    for key in (key for key in start if ".adapter." in key):
        assert torch.equal(first[key], start[key])
        assert f"optimizer.exp_avg.{key}" not in first
        if key.endswith(OUT):  # Adam's first update is the learning rate, but for tiny gradients
            moved = second[key].abs()
            trained = second[f"optimizer.exp_avg.{key}"].abs() > 1e-6
            assert trained.float().mean() > 0.5, key
            torch.testing.assert_close(
                moved[trained], torch.full_like(moved[trained], 1e-2), rtol=2e-2, atol=0
            )
    updates = read_progress(step_folder(runs.root / "role", 2)).updates_by_role
    assert updates is not None
    assert (updates["adapters"], updates["router"]) == (1, 2)
    assert not {"attention", "experts"} & updates.keys()


class _Plus(torch.nn.Module):
    """Add FACTOR * B A to a weight, or to one per expert; B has these rows of a fused matrix."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.a_RI, self.b_OR, self.rows = a_RI, b_OR, rows

    def forward(self, weight: Tensor) -> Tensor:
        return weight + FACTOR * self.b_OR[..., self.rows, :] @ self.a_RI


def qkv_rows(heads: int, groups: int, width: int) -> list[Tensor]:
    """Rows of q, k and v in a matrix that fuses them group by group."""
    fused = torch.arange((heads + 2 * groups) * width).view(groups, -1, width)
    return [part.flatten() for part in fused.split([heads // groups, 1, 1], dim=1)]


def adapt(model: Any, stored: dict[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    """Add trainable adapters with the values of a checkpoint; return them under its names."""
    model.requires_grad_(False)
    factors = {
        key: torch.nn.Parameter(value.double())
        for key, value in stored.items()
        if ".adapter." in key and not key.startswith("optimizer.")
    }
    for layer, block in enumerate(model.model.layers):
        attention, experts = block.self_attn, block.mlp.experts
        fused = [attention.q_proj, attention.k_proj, attention.v_proj]
        for linear, modules, weight, rows in (
            (QKV, fused, "weight", qkv_rows(8, 4, 8)),
            (PROJ, [attention.o_proj], "weight", [torch.arange(64)]),
            (FC1, [experts], "gate_up_proj", [torch.arange(2 * 96)]),
            (FC2, [experts], "down_proj", [torch.arange(64)]),
        ):
            name = f"decoder.layers.{layer}.{linear}"
            for module, own in zip(modules, rows, strict=True):
                plus = _Plus(factors[name + IN], factors[name + OUT], own)
                register_parametrization(module, weight, plus)
    return factors


def test_training_is_that_of_torch_optim_on_the_transformers_model(llama: Runs):
    """Three steps in float64.

    Gradients in fp32 have an error of 1e-5 of the largest. With an eps as large as the gradients,
    an update is a smooth function of them, so it has no more: 3e-4 of the learning rate.
    """
    settings = {"lr": 1e-2, "min_lr": 1e-2, "adam_eps": 1e-2, "lr_decay_style": "constant",
                "weight_decay": 0.1}  # fmt: skip
    rest = ["router", "norms", "embeddings"]
    lines = llama.train("hand", train={"steps": 3, "freeze": rest}, optimizer=settings)
    llama.train("hand-0", train={"steps": 0})
    export_checkpoint(llama.root / "hand-0", llama.root / "hand-hf")
    model = AutoModelForCausalLM.from_pretrained(
        llama.root / "hand-hf", dtype=torch.float64, experts_implementation="eager"
    )
    factors = adapt(model, llama.tensors("hand-0", 0))
    optimizer = torch.optim.AdamW(
        factors.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1
    )
    samples = Samples(TokenStream(llama.tokens, vocab_size=257), seq_length=32, seed=0)
    for step in range(3):
        ids = [torch.from_numpy(samples[4 * step + k].ids_T.copy()) for k in range(4)]
        ids_BT = torch.stack(ids).long()
        logits = model(ids_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        assert lines[step + 1]["loss/lm"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = llama.tensors("hand", 3)
    for key, factor in factors.items():
        torch.testing.assert_close(trained[key].double(), factor.data, rtol=0, atol=3e-6)


def test_an_export_scores_what_the_trainer_scored(llama: Runs):
    """Held-out chunks, scored by transformers: 1e-5 as between layouts."""
    validation = {"validation_path": str(llama.tokens), "validation_samples": 5}
    optimizer = {"lr": 1e-2, "min_lr": 1e-2}
    lines = llama.train("scored", layout="tp2 dp2 ep2", data=validation, optimizer=optimizer)
    out = llama.root / "scored-hf"
    export_checkpoint(llama.root / "scored", out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    samples = Samples(TokenStream(llama.tokens, vocab_size=257), seq_length=32, seed=0)
    ids_BT = torch.stack([torch.from_numpy(samples.chunk(i).ids_T.copy()) for i in range(5)])
    with torch.no_grad():
        logits = model(ids_BT[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    assert loss.item() == pytest.approx(lines[-1]["loss/validation"], rel=1e-5)
    assert lines[0]["loss/validation"] != pytest.approx(lines[-1]["loss/validation"], rel=1e-3)

    stored, merged = llama.tensors("scored", 5), load_file(out / "model.safetensors")
    name = f"decoder.layers.3.{QKV}"
    update = FACTOR * stored[name + OUT].double() @ stored[name + IN].double()
    fused = stored[name + "weight"].double() + update
    for part, rows in zip("qkv", qkv_rows(8, 4, 8), strict=True):
        ours = merged[f"model.layers.3.self_attn.{part}_proj.weight"].double()
        torch.testing.assert_close(ours, fused[rows], rtol=2**-22, atol=1e-8)
    assert_cosines_are_those_of_the_export(step_folder(llama.root / "scored", 5), merged)
    assert {key for key in merged if "lora" in key or "adapter" in key} == set()
    assert has_adapters(llama.root / "scored"), "the command says so"
    card = (out / "README.md").read_text()
    assert "| adapters | LoRA of rank 4, alpha 8, on attention, experts; merged |" in card


def assert_cosines_are_those_of_the_export(checkpoint: Path, merged: dict[str, Tensor]) -> None:
    """Analysis compares experts with their adapters: copies, so neurons are in the same order."""
    config, spec = read_config(checkpoint), read_spec(checkpoint / "source")
    with GlobalTensors(checkpoint) as tensors:
        plan = plan_of(checkpoint, spec, config)
        ours = layer_similarity(tensors, plan, 2, None, lora=config.lora).between_EE
    layer = "model.layers.2.block_sparse_moe.experts."
    rows = [
        torch.cat([merged[f"{layer}{expert}.{name}.weight"].double().flatten() for name in names])
        for expert, names in ((expert, ("w1", "w2", "w3")) for expert in range(4))
    ]
    unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    torch.testing.assert_close(ours, unit @ unit.T, rtol=0, atol=1e-6)
    assert ours.min() < 1 - 1e-4, "copies without their adapters would be equal"


def test_a_checkpoint_with_adapters_is_no_source(runs: Runs):
    one_rank(runs)
    folder = step_folder(runs.root / "one", 5)
    with pytest.raises(CheckpointError) as caught:
        open_source_of(folder)
    assert "holds adapters (lora.rank), which are not read" in str(caught.value)
    assert "export the run with megatron-moe export" in str(caught.value)


def open_source_of(folder: Path) -> Any:
    shutil.copyfile(folder / "source" / "config.json", folder / "config.json")
    try:
        return open_source(folder)
    finally:
        (folder / "config.json").unlink()


def test_other_adapters_are_refused_on_a_resume(runs: Runs):
    one_rank(runs)
    before = read_config(step_folder(runs.root / "one", 5))
    from megatron_moe.commands.resuming import changed_settings

    for change, why in (
        ({"rank": 8}, "(8) was 4: the checkpoint has adapters of another rank, or none"),
        ({"rank": 0}, "(0) was 4: the checkpoint has adapters of another rank, or none"),
        ({"alpha": 1.0}, "(1.0) was 8.0: the trained adapters would have another factor"),
    ):
        now = before.model_copy(update={"lora": before.lora.model_copy(update=change)})
        with pytest.raises(ConfigError) as caught:
            changed_settings(before, now, step=5)
        assert why in str(caught.value)
