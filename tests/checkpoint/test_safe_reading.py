"""Tests that resume and export never execute code from a checkpoint folder.

Each pickle below creates a file if it is loaded the way torch and Megatron-Core load it; a control
test shows that it would.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from old_checkpoints import as_of_version_0_1
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import newest
from megatron_moe.checkpoint.index import SafeReader
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.errors import CheckpointError

pytestmark = pytest.mark.distributed


class Payload:
    """Run ``os.system`` when unpickled without restrictions."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self):
        return os.system, (f"touch {self.evidence}",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the settings of a two-step run that has checkpoints of both steps."""
    root = tmp_path_factory.mktemp("unpickle")
    dense, tokens = save_dense(root / "dense"), write_tokens(root / "tokens")
    settings = tree(
        root / "run", dense, tokens, train={"steps": 2}, checkpoint={"interval": 1},
        parallel={"expert_parallel_size": 2},
    )  # fmt: skip
    run_training(settings, world_size=2)
    return settings


@pytest.fixture
def copy(run: dict, tmp_path: Path) -> dict:
    """Copy the run into its own folder, with one step left to train.

    There are no checksums, which would notice these changes: whoever makes them on purpose can
    write checksums too.
    """
    shutil.copytree(run["run"]["dir"], tmp_path / "run")
    as_of_version_0_1(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000001\n")
    return {**run, "run": {**run["run"], "dir": str(tmp_path / "run")}}


def newest_of(settings: dict) -> Path:
    folder = newest(Path(settings["run"]["dir"]))
    assert folder is not None
    return folder


def in_the_index(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def in_the_index_beside_what_belongs_there(folder: Path, payload: Payload) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_tensor(folder: Path, payload: Payload) -> None:
    """Replace one of the pickled tensors by the payload, at the end of its file."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    where = next(w for i, w in metadata.storage_data.items() if "experts" in i.fqn)
    buffer = io.BytesIO()
    torch.save([payload], buffer)
    with (folder / where.relative_path).open("r+b") as file:
        where.offset, where.length = file.seek(0, os.SEEK_END), len(buffer.getvalue())
        file.write(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = [in_the_index, in_the_index_beside_what_belongs_there, in_a_tensor]


REFUSED = r"system is not allowed in an index|[Ww]eights.only"


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_resuming_runs_nothing(copy: dict, tmp_path: Path, place: Callable):
    payload = Payload(tmp_path / "evidence")
    place(newest_of(copy), payload)
    with pytest.raises(CheckpointError, match=REFUSED):
        run_training(copy, world_size=2)
    assert not payload.evidence.exists()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_exporting_runs_nothing(copy: dict, tmp_path: Path, place: Callable):
    payload = Payload(tmp_path / "evidence")
    place(newest_of(copy), payload)
    with pytest.raises(CheckpointError, match=REFUSED):
        export_checkpoint(newest_of(copy), tmp_path / "hf")
    assert not payload.evidence.exists()
    assert not (tmp_path / "hf").exists()


def test_pickles_that_are_not_part_of_a_checkpoint_are_not_opened(copy: dict, tmp_path: Path):
    """Megatron-Core would load common.pt; none of our commands do."""
    payload = Payload(tmp_path / "evidence")
    torch.save(payload, newest_of(copy) / "common.pt")
    export_checkpoint(newest_of(copy), tmp_path / "hf")
    run_training(copy, world_size=2)
    assert not payload.evidence.exists()


def test_the_payload_would_run(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "evidence")))
    assert (tmp_path / "evidence").exists()


def test_an_index_that_points_out_of_its_folder_is_refused(copy: dict, tmp_path: Path):
    folder = newest_of(copy)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    where = next(iter(metadata.storage_data.values()))
    for elsewhere in ("../other/__0_0.distcp", "/etc/passwd", ".."):
        where.relative_path = elsewhere
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="points outside its folder: " + elsewhere):
            SafeReader(folder).read_metadata()
    with pytest.raises(CheckpointError, match="points outside its folder"):
        run_training(copy, world_size=2)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80"])
def test_a_damaged_index_is_named(copy: dict, damage: Callable):
    folder = newest_of(copy)
    (folder / ".metadata").write_bytes(damage((folder / ".metadata").read_bytes()))
    with pytest.raises(CheckpointError, match=r"cannot read .*\.metadata"):
        run_training(copy, world_size=2)
