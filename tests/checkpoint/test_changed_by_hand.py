"""Checkpoints that somebody renamed, swapped, linked or removed by hand are never mistaken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoints import CONFIG, progress, save, saved_steps

from megatron_moe.checkpoint.folder import (
    describe,
    find_checkpoint,
    in_its_run,
    keep_plan,
    newest,
    prune,
    publish,
    read_progress,
    start_folder,
    step_folder,
    with_way_out,
)
from megatron_moe.config.load import dump
from megatron_moe.errors import CheckpointError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with checkpoints of steps 4 and 8."""
    (tmp_path / "dense").mkdir()
    for step in (4, 8):
        save(tmp_path / "run", step, tmp_path / "dense")
    return tmp_path / "run"


def rename(run: Path, old: int, new: int) -> None:
    step_folder(run, old).rename(step_folder(run, new))


def name(run: Path, step: int) -> None:
    (run / "checkpoints" / "latest").write_text(f"{step_folder(run, step).name}\n")


def swap(run: Path) -> None:
    rename(run, 8, 99)
    rename(run, 4, 8)
    rename(run, 99, 4)


def move(run: Path) -> None:
    rename(run, 8, 6)
    name(run, 6)


def copy_over(run: Path) -> None:
    shutil.rmtree(step_folder(run, 8))
    shutil.copytree(step_folder(run, 4), step_folder(run, 8))


@pytest.mark.parametrize(
    ("change", "held", "way_out"),
    [
        (swap, 4, "rename step_00000004 to step_00000008; rename step_00000008 to step_00000004"),
        (move, 8, "rename step_00000006 to step_00000008"),
        (copy_over, 4, "remove step_00000008, because there is another checkpoint step_00000004"),
    ],
    ids=["swapped", "renamed", "copied-over"],
)
def test_a_folder_with_the_name_of_another_step_is_refused(
    run: Path, change: Callable[[Path], None], held: int, way_out: str
):
    change(run)
    folder = newest(run)
    assert folder is not None
    for reader in (read_progress, find_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            reader(folder)
        message = str(caught.value)
        assert message.startswith(f"{folder} must hold the checkpoint of the step in its name, but")
        assert f"checkpoint.json is of step {held}: folders were renamed, swapped" in message
        assert f"\n  {way_out}; then write the name of the checkpoint to resume from" in message


def test_a_folder_in_the_place_of_checkpoint_json_is_named(run: Path):
    path = step_folder(run, 8) / "checkpoint.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=rf"cannot read {path}: Is a directory"):
        read_progress(path.parent)


def test_the_way_out_of_a_renamed_folder_leads_out(run: Path):
    swap(run)
    swap(run)
    assert read_progress(step_folder(run, 8)) == progress(8)


def test_a_checkpoint_may_be_copied_to_any_other_name(run: Path):
    best = Path(shutil.copytree(step_folder(run, 8), run / "best"))
    assert read_progress(best) == progress(8)


def test_a_way_out_names_no_renamed_folder_and_prefers_older_ones(run: Path, tmp_path: Path):
    for step in (12, 16, 20):
        save(run, step, tmp_path / "dense")
    shutil.rmtree(step_folder(run, 8))
    rename(run, 16, 8)
    message = str(with_way_out(CheckpointError("damaged"), step_folder(run, 12)))
    assert message.startswith("damaged\n  write step_00000004 into ")


def make_folder(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (make_folder, "a folder"),
        (os.mkfifo, "a named pipe (FIFO)"),
        (link_to_nothing, "a symbolic link to gone, which is not there"),
    ],
)
def test_a_latest_that_is_no_file_is_refused(run: Path, make: Callable[[Path], None], what: str):
    """A pipe would block the reader, and a link to nothing would restart the run at step 0."""
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    make(latest)
    with pytest.raises(CheckpointError) as caught:
        newest(run)
    assert f"{latest} must be a text file with the name of a checkpoint" in str(caught.value)
    assert f"but is {what}.\n  move it away and write another name into" in str(caught.value)


def test_a_removed_newest_checkpoint_leads_to_one_that_is_there(run: Path):
    shutil.rmtree(step_folder(run, 8))
    with pytest.raises(CheckpointError, match=r"\n  write another .*, such as step_00000004, or"):
        newest(run)


def test_checkpoints_on_another_disk_are_replaced_and_pruned_as_links(run: Path, tmp_path: Path):
    """The operator moved them and left links behind. Only links are removed."""
    moved = tmp_path / "other disk"
    moved.mkdir()
    for step in (4, 8):
        folder = step_folder(run, step)
        shutil.move(folder, moved / folder.name)
        folder.symlink_to(moved / folder.name)
    final = save(run, 8, tmp_path / "dense")
    assert not final.is_symlink()
    assert [path.name for path in prune(run, keep=1)] == ["step_00000004"]
    assert saved_steps(run) == ["step_00000008"]
    assert sorted(path.name for path in moved.iterdir()) == ["step_00000004", "step_00000008"]


@pytest.mark.parametrize("name", ["step_00000012", ".step_00000012.partial", ".step_8.partial"])
@pytest.mark.parametrize("make", [Path.touch, link_to_nothing, os.mkfifo])
def test_a_save_replaces_whatever_has_the_name_of_its_folder(
    run: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
):
    make(run / "checkpoints" / name)
    final = step_folder(run, 12)
    partial = start_folder(final)
    describe(partial, progress(12), dump(CONFIG), tmp_path / "dense")
    publish(partial, final)
    assert newest(run) == final
    assert read_progress(final) == progress(12)


def test_a_linked_checkpoint_belongs_to_the_run_with_the_link(run: Path, tmp_path: Path):
    folder = step_folder(run, 8)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert in_its_run(folder) == folder
    (tmp_path / "best").symlink_to(folder)
    assert in_its_run(step_folder(tmp_path / "best" / ".." / "run", 8)) == folder


def test_a_resume_restores_the_plan_that_saves_copy(run: Path):
    checkpoint, kept = step_folder(run, 8), run / "plan.safetensors"
    assert keep_plan(run, checkpoint) == "", "the run needs no plan"
    (checkpoint / "plan.safetensors").write_text("the plan")
    assert "was gone; the plan of step_00000008 is in its place" in keep_plan(run, checkpoint)
    assert kept.read_text() == "the plan"
    assert keep_plan(run, checkpoint) == ""
    kept.write_text("another")
    assert "was not that of the checkpoint, and is now plan" in keep_plan(run, checkpoint)
    assert kept.read_text() == "the plan"
    assert (run / "plan.safetensors.other").read_text() == "another"
