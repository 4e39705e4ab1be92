"""Frozen roles keep their bits, the others train as if nothing were frozen, under any layout.

The oracle is one rank, and for one step the run without freezing: its gradients do not depend on
what is frozen, so the moments of the trained parameters are the same.
"""

import json
import re
import shutil
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from training_runs import Runs, make_runs, read_metrics

from megatron_moe.checkpoint.folder import read_progress, step_folder
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
WORDS = {  # a part of Megatron-Core's names for each role; norms come first
    "norms": "norm", "router": ".router.", "shared_experts": ".shared_experts.",
    "experts": ".experts.", "attention": ".self_attention.", "dense_ffn": ".mlp.linear",
    "embeddings": "",
}  # fmt: skip
EVERY = {
    "moe": {"num_moe_experts": 4, "moe_layers": [1, 2], "moe_ffn_hidden_size": 16,
            "moe_shared_expert_intermediate_size": 32},
    "upcycle": {"method": "split_random"},
    "optimizer": {"warmup_steps": 0},  # so that the first step changes weights
    "checkpoint": {"keep": 100},
}  # fmt: skip
"""A model with every role: two layers stay dense, experts are parts, one of them shared."""


def role_of(key: str) -> str:
    return next(role for role, word in WORDS.items() if word in key)


def layer_of(key: str) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", key)
    return "none" if layer is None else layer[1]


def named(key: str, names: Iterable[str]) -> str | None:
    """The name in settings that a tensor of a checkpoint has among ``names``."""
    role, layer = role_of(key), layer_of(key)
    for name in names:
        of, _, layers = name.partition("@")
        first, _, last = layers.partition("-")
        inside = layer != "none" and first and int(first) <= int(layer) <= int(last or first)
        if of == role and (not layers or inside):
            return name
    return None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("freezing"), "qwen3", EVERY, tie_word_embeddings=True)


def weights_of(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in stored.items() if not key.startswith("optimizer.")}


@pytest.fixture(scope="module")
def start(runs: Runs) -> dict[str, torch.Tensor]:
    """The weights before the first step."""
    runs.train("start", train={"steps": 0})
    return runs.tensors("start", 0)


@pytest.fixture(scope="module")
def free(runs: Runs) -> dict[str, torch.Tensor]:
    """The checkpoint after one step that trains everything."""
    runs.train("free", train={"steps": 1}, optimizer={"clip_grad": 1e9})
    return runs.tensors("free", 1)


FROZEN = [
    pytest.param("1", ["embeddings"], marks=pytest.mark.slow),
    pytest.param("1", ["experts"], marks=pytest.mark.slow),
    ("tp2", ["attention", "norms", "embeddings"]),
    ("pp2 vpp2 recompute-full", ["router", "embeddings", "dense_ffn", "attention", "norms"]),
    ("dp2 ep2", ["attention", "dense_ffn", "norms", "embeddings", "router", "shared_experts"]),
    pytest.param("tp2 dp2 ep2 etp2", ["shared_experts", "experts"], marks=pytest.mark.slow),
    pytest.param("dp2 replicated", ["experts", "dense_ffn", "embeddings"], marks=pytest.mark.slow),
    ("pp2", ["experts", "shared_experts", "attention", "dense_ffn", "norms", "embeddings"]),
    ("tp2 dp2 ep2", ["attention@0-2", "experts@2", "norms@3", "router@1", "shared_experts@1-2"]),
    (  # nothing is trained on the first stage
        "pp2",
        ["embeddings", "attention@0-1", "norms@0-1", "dense_ffn@0", "router@1", "experts@1",
         "shared_experts@1"],
    ),
    pytest.param("pp2 vpp2 recompute-full", ["embeddings", "attention@1-2", "norms@0-2"],
                 marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "frozen"), FROZEN, ids=lambda value: str(value)[:40])
def test_frozen_roles_keep_their_bits_and_the_others_their_gradients(
    runs: Runs,
    start: dict[str, torch.Tensor],
    free: dict[str, torch.Tensor],
    layout: str,
    frozen: list[str],
):
    """fp32 sums have another order under another layout: 1e-4 of the largest of a tensor."""
    where = f"frozen {layout} {'-'.join(frozen)}"
    runs.train(where, layout=layout, train={"steps": 1, "freeze": frozen},
        optimizer={"clip_grad": 1e9}, checkpoint={"interval": 1})  # fmt: skip
    after = runs.tensors(where, 1)
    assert weights_of(after).keys() == weights_of(free).keys()
    assert {role_of(key) for key in weights_of(after)} == set(WORDS)
    for key, value in weights_of(after).items():
        moments = [f"optimizer.{name}.{key}" for name in ("exp_avg", "exp_avg_sq")]
        if named(key, frozen):
            assert torch.equal(value, start[key]), key
            assert not any(moment in after for moment in moments), key
        else:
            assert not torch.equal(value, start[key]), key
            for moment in moments:
                largest = float(free[moment].abs().max())
                torch.testing.assert_close(after[moment], free[moment], rtol=0, atol=1e-4 * largest)
    updates = read_progress(step_folder(runs.root / where, 1)).updates_by_role
    receipt = json.loads((runs.root / where / "receipt.json").read_text())
    assert receipt["frozen"] == sorted(frozen)
    by_layer = "@" in " ".join(frozen)
    assert updates == {
        f"{role_of(key)}@{layer_of(key)}" if by_layer else role_of(key): 1
        for key in weights_of(after)
        if not named(key, frozen)
    }


# ---- multipliers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "decays"),
    [
        ({"router": 10.0, "norms": 0.5}, {"router": 3.0, "attention": 0.0}),
        ({"attention@0-1": 10.0, "attention@3": 0.5, "norms@2": 2.0}, {"experts@1": 3.0}),
    ],
    ids=["roles", "layers"],
)
def test_multipliers_scale_the_update_of_their_part(
    runs: Runs,
    start: dict[str, torch.Tensor],
    free: dict[str, torch.Tensor],
    rates: dict[str, float],
    decays: dict[str, float],
):
    """One step moves weights by -lr * (Adam's update + weight decay * weight), in float64.

    fp32 rounds the weight: half a unit in the last place, 2^-24 of it, and as much of the update.
    """
    where = f"multipliers {'-'.join(rates)}"
    runs.train(where, train={"steps": 1}, optimizer={
        "clip_grad": 1e9, "lr": 1e-3, "min_lr": 1e-3, "lr_multipliers": rates,
        "weight_decay_multipliers": decays, "weight_decay": 0.2})  # fmt: skip
    after = runs.tensors(where, 1)
    for key, weight in weights_of(start).items():
        role, w = role_of(key), weight.double()
        m, v = (after[f"optimizer.{name}.{key}"].double() for name in ("exp_avg", "exp_avg_sq"))
        assert torch.equal(m.float(), free[f"optimizer.exp_avg.{key}"]), key
        update = (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)
        factor, decay = (factors.get(named(key, factors) or "", 1.0) for factors in (rates, decays))
        decay = 0.0 if role == "norms" else 0.2 * decay
        expected = w - 1e-3 * factor * (update + decay * w)
        torch.testing.assert_close(after[key].double(), expected, rtol=2**-22, atol=1e-8)


# ---- stages --------------------------------------------------------------------------------------

LAST = ["attention", "dense_ffn", "norms", "embeddings"]
STAGES = [
    {"steps": 2, "freeze": [role for role in WORDS if role != "router"]},
    {"steps": 2, "freeze": LAST},
    {},
]
"""Routers only, then also experts, then everything."""
EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "router/load_imbalance")


def staged(runs: Runs, where: str, layout: str = "1", **sections: Any) -> list[Any]:
    train = {"steps": 6, "stages": STAGES, **sections.pop("train", {})}
    return runs.train(where, layout=layout, train=train, **sections)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_stages_across_a_resume_are_the_uninterrupted_run(runs: Runs, precision: str):
    """Stopped within a stage and at the end of one; the optimizer state is the same too."""
    settings = {"train": {"precision": precision}, "checkpoint": {"interval": 1}}
    where = f"stages-{precision}"
    whole = staged(runs, where, "dp2 ep2", **settings)
    assert [line["step"] for line in whole] == list(range(7))
    last = runs.tensors(where, 6)
    for step in (2, 3, 4):
        again = f"{where}-from-{step}"
        shutil.copytree(runs.root / where, runs.root / again)
        latest = runs.root / again / "checkpoints" / "latest"
        latest.write_text(f"step_{step:08d}\n")
        lines = staged(runs, again, "dp2 ep2", **settings)
        for ours, expected in zip(lines[1:], whole[1:], strict=True):
            assert {k: ours[k] for k in EXACT} == {k: expected[k] for k in EXACT}
        ours = runs.tensors(again, 6)
        assert ours.keys() == last.keys()
        assert all(torch.equal(ours[key], last[key]) for key in last)


@pytest.mark.parametrize(
    "layout",
    [
        "pp2",
        "dp2 ep2",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp2", "dp2 replicated")),
    ],
)
def test_stages_under_a_layout_equal_those_of_one_rank(runs: Runs, layout: str):
    """1e-5 and 1e-4 as in test_invariance.py."""
    if not (runs.root / "stages-one").exists():
        staged(runs, "stages-one", "1")
    lines = staged(runs, f"stages {layout}", layout)
    for ours, expected in zip(lines[1:], read_metrics(runs.root / "stages-one")[1:],
                              strict=True):  # fmt: skip
        assert ours["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


BY_LAYER = [
    {"steps": 2, "freeze": ["embeddings", "norms", "attention@0-2", "experts@1", "dense_ffn@0"]},
    {"steps": 1, "freeze": ["router@2", "attention@0"]},
    {},
]


def test_stages_by_layer_equal_those_of_one_rank_across_a_resume_under_another_layout(runs: Runs):
    """Updates are counted by layer; a part that was frozen begins anew. 1e-5, 1e-4 as above."""
    train, checkpoint = {"steps": 5, "stages": BY_LAYER}, {"interval": 1}
    expected = runs.train("layers-one", train=train, checkpoint=checkpoint)
    runs.train("layers-pp", layout="pp2 vpp2", train=train, checkpoint=checkpoint)
    (runs.root / "layers-pp" / "checkpoints" / "latest").write_text("step_00000003\n")
    lines = runs.train("layers-pp", layout="tp2", train=train, checkpoint=checkpoint)
    for ours, theirs in zip(lines[1:], expected[1:], strict=True):
        assert ours["loss/lm"] == pytest.approx(theirs["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    updates = read_progress(step_folder(runs.root / "layers-pp", 5)).updates_by_role
    assert updates is not None
    for label, count in {"attention@0": 2, "attention@2": 3, "attention@3": 5, "experts@1": 3,
                         "experts@2": 5, "router@1": 5, "router@2": 2,
                         "norms@none": 3}.items():  # fmt: skip
        assert updates[label] == count, label


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_role_that_a_stage_begins_to_train_starts_as_in_a_new_run(runs: Runs, precision: str):
    """Adam's first update is the sign of the gradient: bias correction counts its own updates.

    |update| is below 1 only by eps; 1e-2 of it allows for gradients of 1e-6. With bf16 weights, the
    fp32 master weights begin with the weights.
    """
    where, master = f"begins-{precision}", "optimizer.master." if precision == "bf16" else ""
    settings = {"train": {"steps": 3, "precision": precision,
                          "stages": [{"steps": 2, "freeze": ["experts"]}, {}]},
                "checkpoint": {"interval": 1},
                "optimizer": {"lr_decay_style": "constant", "weight_decay": 0.0}}  # fmt: skip
    runs.train(where, **settings)
    before, after = runs.tensors(where, 2), runs.tensors(where, 3)
    updates = read_progress(step_folder(runs.root / where, 3)).updates_by_role
    assert updates == {role: 1 if role == "experts" else 3 for role in WORDS}
    for key in weights_of(after):
        if role_of(key) == "experts":
            moved = ((after[master + key] - before[key]) / 1e-3).abs()
            trained = after[f"optimizer.exp_avg.{key}"].abs() > 1e-7
            assert trained.float().mean() > 0.5
            torch.testing.assert_close(
                moved[trained], torch.ones_like(moved[trained]), rtol=0, atol=1e-2
            )


def test_settings_of_freezing_may_change_on_a_resume(runs: Runs):
    """A run without roles takes a checkpoint that counts them, and the other way round."""

    def steps(number: int, freeze: list[str]) -> dict[str, Any]:
        return {"train": {"steps": number, "freeze": freeze}, "checkpoint": {"interval": 1}}

    runs.train("changing", **steps(1, []))
    runs.train("changing", **steps(2, ["experts"]))
    runs.train("changing", layout="tp2", **steps(3, []))
    updates = [
        read_progress(step_folder(runs.root / "changing", step)).updates_by_role
        for step in (1, 2, 3)
    ]
    assert updates[0] is None
    assert updates[1] == {role: 2 for role in WORDS if role != "experts"}
    assert updates[2] == {role: 1 if role == "experts" else 3 for role in WORDS}
    changed = (runs.root / "changing" / "resumed.jsonl").read_text()
    assert "parameters that were frozen start with empty optimizer state" in changed


def test_the_model_of_the_stage_before_is_freed(runs: Runs):
    train = {"steps": 2, "stages": [{"steps": 1, "freeze": ["experts"]}, {}]}
    config = build(RunConfig, runs.settings("freed", train=train))
    config.run.dir.mkdir()
    run_on_ranks(check_freed, config, world_size=1)


def check_freed(world: World, config: RunConfig) -> None:
    from megatron_moe.commands import stages
    from megatron_moe.commands.train import train

    restored = stages.restored_state
    release = stages.TrainState.release
    seen: list[weakref.ref] = []

    def watched(*args: Any) -> Any:
        assert all(tensor() is None for tensor in seen)
        return restored(*args)

    def releasing(state: Any) -> None:
        seen.extend(weakref.ref(p) for module in state.model.modules for p in module.parameters())
        seen.extend(weakref.ref(b.grad_data) for chunk in state.wrapped for b in chunk.buffers)
        release(state)

    stages.restored_state = watched
    stages.TrainState.release = releasing
    train(config, world)
    assert len(seen) > 20
