"""Local copies: a restart from them equals an undisturbed run, also after the loss of a disk.

Two ranks with a folder each stand for two nodes. That a restart reads no tensors from the run's
folder is shown by removing them there.
"""

import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.checkpoint.disks import Disks
from megatron_moe.checkpoint.rank_file import read_state
from megatron_moe.config.load import build
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.errors import CheckpointError, ConfigError, JobError, UserError
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed

EXACT = ("step", "loss/lm", "grad_norm", "learning_rate", "tokens/seen", "router/load_imbalance")
STEPS, INTERVAL, KILLED_AT = 7, 3, 6
"""Checkpoints after steps 3 and 6; the job dies in step 6, with local copies of step 5."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    save_dense(root / "dense", num_hidden_layers=2)
    write_tokens(root / "tokens")
    return root


def settings(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    return tree(
        root / name, root / "dense", root / "tokens",
        **{
            "parallel": {"expert_parallel_size": 2},
            "train": {"steps": STEPS, "global_batch_size": 4, "precision": "bf16"},
            "checkpoint": {"interval": INTERVAL, "local_interval": 1},
            **changes,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(inputs: Path) -> list[dict[str, Any]]:
    run_training(settings(inputs, "undisturbed"), world_size=2)
    return exact(inputs / "undisturbed")


def exact(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: line.get(name) for name in EXACT} for line in read_metrics(run_dir)]


def on_nodes(world: World, config: RunConfig, nodes: list[Path], killed_at: int | None) -> None:
    """Train with a folder per node; note the first step, and kill all ranks in a step."""
    from megatron_moe.commands.train import train

    node = nodes[world.rank * len(nodes) // world.size]
    local = config.checkpoint.model_copy(update={"local_dir": node})
    first = config.run.dir / "first"
    first.unlink(missing_ok=True)

    def observe(stage: str, step: int) -> None:
        if stage == "data" and world.rank == 0 and not first.exists():
            first.write_text(str(step))
        if (stage, step) == ("backward", killed_at):
            os.kill(os.getpid(), signal.SIGKILL)

    train(config.model_copy(update={"checkpoint": local}), world, observe)


def job(config: RunConfig, nodes: list[Path], killed_at: int | None = None) -> int:
    """Run a job on one rank per node; returns its first step."""
    config.run.dir.mkdir(exist_ok=True)
    try:
        run_on_ranks(partial(on_nodes), config, nodes, killed_at, world_size=2)
    except JobError:
        assert killed_at is not None
    return int((config.run.dir / "first").read_text())


Killed = tuple[RunConfig, list[Path]]


@pytest.fixture(scope="module")
def once_killed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Killed, Path]:
    """Return a job that was killed in step 6, and a copy of all its files."""
    root, kept = tmp_path_factory.mktemp("nodes"), tmp_path_factory.mktemp("kept") / "all"
    config = build(RunConfig, settings(root.parent / inputs.name, f"../{root.name}/run"))
    nodes = [root / "node0", root / "node1"]
    assert job(config, nodes, KILLED_AT) == 1
    shutil.copytree(root, kept)
    return (config, nodes), kept


@pytest.fixture
def killed(once_killed: tuple[Killed, Path]) -> Killed:
    """Return the killed job with its files as it left them."""
    (config, nodes), kept = once_killed
    shutil.rmtree(nodes[0].parent)
    shutil.copytree(kept, nodes[0].parent)
    return config, nodes


def lose_a_disk(run: Path, nodes: list[Path]) -> None:
    shutil.rmtree(nodes[1])


def files_of(nodes: list[Path], rank: int, suffix: str) -> list[Path]:
    return [f for node in nodes for f in node.glob(f"*/step_*/rank_{rank:05d}{suffix}")]


def flip_a_bit(run: Path, nodes: list[Path], *, of: int = 1, suffix: str = ".bin") -> None:
    for path in files_of(nodes, 0, suffix)[:of]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def lose_tensors_of_the_run(run: Path, nodes: list[Path]) -> None:
    for path in run.glob("checkpoints/*/*.distcp"):
        path.unlink()


def lose_tensors_and_a_disk(run: Path, nodes: list[Path]) -> None:
    lose_tensors_of_the_run(run, nodes)
    lose_a_disk(run, nodes)


def lose_both_disks(run: Path, nodes: list[Path]) -> None:
    for node in nodes:
        shutil.rmtree(node)


def swap_ranks(run: Path, nodes: list[Path], *, on: int, suffixes: tuple[str, ...]) -> None:
    """Exchange the files of ranks 0 and 1 on some nodes."""
    for suffix in suffixes:
        for first, second in zip(
            files_of(nodes[:on], 0, suffix), files_of(nodes[:on], 1, suffix), strict=True
        ):
            kept = first.rename(first.with_name("kept"))
            second.rename(first)
            kept.rename(second)


def rename_steps(run: Path, nodes: list[Path], *, on: int) -> None:
    for path in files_of(nodes[:on], 0, ".bin"):
        path.parent.rename(path.parent.with_name("step_00000009"))


def put_a_folder(run: Path, nodes: list[Path], *, on: int) -> None:
    """Put a folder in the place of a file."""
    for path in files_of(nodes[:on], 0, ".bin"):
        path.unlink()
        path.mkdir()


SWAPPED_BYTES = r"rank_00000\.bin is not what was written together with rank_00000\.json"
SWAPPED_FILES = r"rank_00000\.json was renamed: it was written for rank 1 and step 5"
RENAMED = r"step_00000009/rank_00000\.json was renamed: it was written for rank 0 and step 5"
DAMAGES = {
    "lost-tensors": (lose_tensors_of_the_run, 6, None),
    "lost-tensors-and-a-disk": (lose_tensors_and_a_disk, 6, None),
    "bit": (flip_a_bit, 6, r"rank_00000\.bin is not what was written"),
    "bit-of-json": (partial(flip_a_bit, suffix=".json"), 6, r"rank_00000\.json is damaged"),
    "bits-of-both": (partial(flip_a_bit, of=2), 4, r"rank_00000\.bin is not what was written"),
    "both-disks": (lose_both_disks, 4, None),
    "swapped-bytes": (partial(swap_ranks, on=1, suffixes=(".bin",)), 6, SWAPPED_BYTES),
    "swapped-bytes-of-both": (partial(swap_ranks, on=2, suffixes=(".bin",)), 4, SWAPPED_BYTES),
    "swapped-files": (partial(swap_ranks, on=1, suffixes=(".bin", ".json")), 6, SWAPPED_FILES),
    "swapped-files-of-both": (
        partial(swap_ranks, on=2, suffixes=(".bin", ".json")), 4, SWAPPED_FILES,
    ),
    "renamed-step": (partial(rename_steps, on=1), 6, RENAMED),
    "renamed-steps-of-both": (partial(rename_steps, on=2), 4, RENAMED),
    "a-folder": (partial(put_a_folder, on=2), 4, r"rank_00000\.bin is missing"),
}  # fmt: skip
"""Damage, the first step after it, and what the log says of the file.

Two damaged copies of a file lead back to the checkpoint of step 3.
"""
SLOW = {
    "lost-tensors", "bit-of-json", "swapped-bytes", "swapped-files-of-both",
    "renamed-steps-of-both", "a-folder",
}  # fmt: skip
"""Damage that is close to another in the table."""


@pytest.mark.parametrize(
    ("damage", "first", "logged"),
    [
        pytest.param(*row, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, row in DAMAGES.items()
    ],
)
def test_a_restart_from_local_copies_equals_the_undisturbed_run(
    killed: Killed, expected: list[dict[str, Any]], capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path, list[Path]], None], first: int, logged: str | None,
):  # fmt: skip
    config, nodes = killed
    copies = files_of(nodes, 0, ".json")
    assert [path.parents[2].name for path in copies] == ["node0", "node1"]
    assert {path.parent.name for path in copies} == {"step_00000005"}, "only the newest is kept"
    damage(config.run.dir, nodes)
    capfd.readouterr()
    assert job(config, nodes) == first
    assert exact(config.run.dir) == expected
    log = capfd.readouterr().out
    if logged is None:
        assert "Local copy not used" not in log
    else:
        assert re.search(rf"^Local copy not used: .*{logged}", log, re.MULTILINE), log
    came_from = "local copies" if first == 6 else f"{config.run.dir}/checkpoints/step_00000003"
    assert f"Resumed {came_from} at step {first - 1}\n" in log
    assert (first == 4 and logged is not None) == ("step_00000003 is used\n" in log)


def test_an_operator_who_goes_back_gets_the_older_checkpoint(
    inputs: Path, tmp_path: Path, expected: list[dict[str, Any]]
):
    config = build(RunConfig, settings(inputs, f"run-{tmp_path.name}"))
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    job(config, nodes, STEPS)  # checkpoints 3 and 6, copies of step 6
    (config.run.dir / "checkpoints" / "latest").write_text("step_00000003\n")
    assert job(config, nodes) == 4
    assert exact(config.run.dir) == expected


def test_another_layout_resumes_from_the_checkpoint(
    killed: Killed, capfd: pytest.CaptureFixture[str]
):
    config, nodes = killed
    changed = config.model_copy(update={"parallel": Parallel(tensor_parallel_size=2)})
    capfd.readouterr()
    assert job(changed, nodes) == 4
    assert "have another layout: step_00000003 is used" in " ".join(capfd.readouterr().out.split())


def test_a_refusing_disk_does_not_end_the_job(
    inputs: Path, tmp_path: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """The older copy stays; /dev/full refuses every write."""
    from megatron_moe.checkpoint import local

    write = local.write_rank_file

    def refused(folder: Path, boxes: Any, *, rank: int, progress: Any, **others: Any) -> None:
        if (rank, progress.step) == (1, 5):
            (folder / "rank_00001.bin").symlink_to("/dev/full")
        write(folder, boxes, rank=rank, progress=progress, **others)

    monkeypatch.setattr(local, "write_rank_file", refused)
    config = build(RunConfig, settings(inputs, f"run-{tmp_path.name}"))
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    job(config, nodes, KILLED_AT)
    assert {path.parent.name for path in files_of(nodes, 1, ".json")} == {"step_00000004"}
    monkeypatch.undo()
    assert job(config, nodes) == 5
    assert exact(config.run.dir) == expected


def test_every_node_needs_as_many_ranks(inputs: Path, tmp_path: Path):
    config = build(RunConfig, settings(inputs, "uneven", parallel={}, train={
        "steps": 1, "global_batch_size": 6,
    }))  # fmt: skip
    config.run.dir.mkdir()
    with pytest.raises(UserError, match=r"checkpoint.local_dir .* is used by 2, 1 ranks") as caught:
        run_on_ranks(on_nodes, config, [tmp_path / "a", tmp_path / "b"], None, world_size=3)
    assert isinstance(caught.value, ConfigError)


def test_neighbors_are_on_the_next_disk():
    disks = Disks(((0, 1), (2, 3), (4, 5)))
    assert [disks.neighbor(rank, 1) for rank in range(6)] == [2, 3, 4, 5, 0, 1]
    assert [disks.neighbor(rank, -1) for rank in range(6)] == [4, 5, 0, 1, 2, 3]
    assert [rank for rank in range(6) if disks.leads(rank)] == [0, 2, 4]


def test_a_missing_file_is_not_read(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"rank_00000\.json is missing"):
        read_state(tmp_path / "rank_00000.json")
