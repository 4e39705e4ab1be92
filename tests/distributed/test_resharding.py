"""A run may leave its layout at any checkpoint: optimizer state included, nothing is lost or moved.

Two oracles. Exact: what is restored under B and saved again is, number for number, what A saved.
And the run itself: the next three losses are those of the run that stayed under A, to the tolerance
between layouts (test_training.py says where 1e-5 comes from).
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import changes, layout
from megatron.core import dist_checkpointing
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import read_progress, step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow
PAIRS = [  # from, to; every axis is left and entered, worlds grow and shrink
    ("dp2", "1"),
    ("1", "dp4 ep4"),
    ("dp2 ep2", "tp2"),
    ("pp2 vpp2", "dp2 ep2"),
    ("tp2 dp2 ep2 etp2", "cp2"),
    pytest.param("tp2 pp2 dp2 ep4", "dp2", marks=slow),
    pytest.param("dp2 replicated", "tp2 pp2", marks=slow),
    ("dp4 ep4", "dp2 replicated"),
    ("pp2 vpp2 layout-E|tt|tt|L", "pp2 layout-Ettt|tL"),
    pytest.param("tp2", "pp2", marks=slow),
    pytest.param("pp2", "pp4", marks=slow),
    pytest.param("cp2", "tp2 dp2 ep4", marks=slow),
    pytest.param("dp2 etp2", "dp2 ep2", marks=slow),
    pytest.param("tp4", "cp2 dp2 ep2", marks=slow),
    pytest.param("1", "tp2 cp2 pp2 ep2 etp2", marks=slow),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("resharding")
    return {
        "root": root,
        "dense": save_dense(root / "dense", tie_word_embeddings=True),
        "tokens": write_tokens(root / "tokens"),
    }


def settings(inputs: dict[str, Path], name: str, where: str, precision: str = "fp32") -> dict:
    parallel = changes(name)[1]["parallel"]
    return tree(
        inputs["root"] / where, inputs["dense"], inputs["tokens"], parallel=parallel,
        train={"steps": 5, "precision": precision}, checkpoint={"interval": 2},
        optimizer={"lr": 1e-3, "use_distributed_optimizer": "replicated" not in name},
    )  # fmt: skip


def stayed(inputs: dict[str, Path], name: str, precision: str = "fp32") -> list[dict[str, Any]]:
    """The uninterrupted run under ``name``, trained once."""
    where = f"{name}-{precision}".replace(" ", "-")
    if not (inputs["root"] / where / "checkpoints").exists():
        run = settings(inputs, name, where, precision)
        return run_training(run, world_size=layout(name)[0])
    return read_metrics(inputs["root"] / where)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_run_resumes_under_another_layout(inputs: dict[str, Path], before: str, after: str):
    expected = stayed(inputs, before)
    source = inputs["root"] / f"{before}-fp32".replace(" ", "-")
    moved = settings(inputs, after, f"{before} to {after}".replace(" ", "-"))
    shutil.copytree(source, moved["run"]["dir"])
    (Path(moved["run"]["dir"]) / "checkpoints" / "latest").write_text("step_00000002\n")

    lines = run_training(moved, world_size=layout(after)[0])

    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    for ours, whole in zip(lines[3:], expected[3:], strict=True):
        assert ours["loss/lm"] == pytest.approx(whole["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert ours["learning_rate"] == whole["learning_rate"]


SAVED_AGAIN = [
    ("dp2 ep2", "tp2 pp2"),
    ("pp2", "1"),
    ("dp2 replicated", "dp2 ep2 etp1"),
    ("tp2", "dp2"),
]


@pytest.mark.parametrize(
    ("before", "after", "precision"),
    [
        (*SAVED_AGAIN[0], "fp32"),
        *(pytest.param(*pair, "fp32", marks=slow) for pair in SAVED_AGAIN[1:]),
        *((*pair, "bf16") for pair in SAVED_AGAIN),  # with master weights besides
    ],
)
def test_saved_again_under_another_layout_it_is_the_same_checkpoint(
    inputs: dict[str, Path], before: str, after: str, precision: str
):
    stayed(inputs, before, precision)
    source = step_folder(inputs["root"] / f"{before}-{precision}".replace(" ", "-"), 2)
    again = settings(inputs, after, f"again-{before}-{after}".replace(" ", "-"), precision)
    config = build(RunConfig, again)
    run_on_ranks(save_again, config, source, world_size=layout(after)[0])

    saved = step_folder(config.run.dir, 2)
    first, second = read_progress(source), read_progress(saved)
    assert (second.samples, second.optimizer_updates) == (first.samples, 2)
    with GlobalTensors(source) as theirs, GlobalTensors(saved) as ours:
        assert ours.names == theirs.names
        kinds = {name.split(".")[1] for name in ours.names if name.startswith("optimizer.")}
        assert kinds == {"exp_avg", "exp_avg_sq"} | ({"master"} if precision == "bf16" else set())
        for name in ours.names:
            a, b = (x.read(name, index=None, dtype=torch.float32) for x in (theirs, ours))
            assert torch.equal(a, b), name
            assert a.any(), name
    shutil.rmtree(config.run.dir)


def save_again(world: World, config: RunConfig, source: Path) -> None:
    from megatron_moe.checkpoint.sharded import Saver, restore
    from megatron_moe.hf.spec import read_spec
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.state import make_state

    result, groups = create_groups(config.parallel, seed=0)
    spec = read_spec(config.source.path)
    model = build_model(
        config, spec, layout=result, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    for parameter in model.modules[0].parameters():
        parameter.data.fill_(torch.nan)  # whatever is not restored tells
    state = make_state(config, model, groups)
    plan_hash = read_progress(source).plan_hash
    restore(state, source, config, groups, plan_hash=plan_hash)
    with Saver(config, plan_hash=plan_hash, say=lambda _: None) as saver:
        saver.save(state, groups)
    # Megatron-Core's own reader finds the same weights under the same names.
    entries = model.modules[0].sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    wanted = {name: entry for name, entry in entries.items() if "_extra_state" not in name}
    loaded: Any = dist_checkpointing.load(wanted, str(step_folder(config.run.dir, 2)))
    for name, parameter in model.modules[0].named_parameters():
        if "word_embeddings" not in name:  # Megatron-Core leaves the padding rows as they are
            assert torch.equal(loaded[name], parameter), name


def test_an_upcycled_checkpoint_takes_any_layout(inputs: dict[str, Path]):
    upcycled = settings(inputs, "dp2 ep2", "upcycled")
    run_training({**upcycled, "train": {**upcycled["train"], "steps": 0}}, world_size=2)
    upcycled["parallel"] = {"tensor_parallel_size": 2}
    lines = run_training(upcycled, world_size=2)
    expected = stayed(inputs, "dp2 ep2")
    assert lines[1]["loss/lm"] == pytest.approx(expected[1]["loss/lm"], rel=1e-5)
