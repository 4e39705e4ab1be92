"""Tests that a changed byte of a checkpoint is noticed, wherever it is, and named."""

import contextlib
import io
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.parallel_state import destroy_model_parallel
from named_pipes import named_pipe
from old_checkpoints import as_of_version_0_1
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint import hashing
from megatron_moe.checkpoint.folder import newest, step_folder
from megatron_moe.checkpoint.index import SafeReader
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.train import train
from megatron_moe.commands.verify import verify
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import Block, read_checksums, write_checksums
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the settings of a run with checkpoints of steps 1 and 2, and one step left."""
    root = tmp_path_factory.mktemp("checksums")
    dense, tokens = save_dense(root / "dense"), write_tokens(root / "tokens")
    settings = tree(
        root / "run", dense, tokens, train={"steps": 2}, checkpoint={"interval": 1},
        parallel={"expert_parallel_size": 2}, run={"dir": str(root / "run"), "device": "cpu"},
    )  # fmt: skip
    run_training(settings, world_size=2)
    settings["train"]["steps"] = 3
    return settings


def checkpoint_of(settings: dict[str, Any]) -> Path:
    return step_folder(Path(settings["run"]["dir"]), 2)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flipped(path: Path, *, share: float) -> Iterator[None]:
    """Flip one bit inside a file; restore it afterwards."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[int(share * (len(content) - 1))] ^= 4
    path.write_bytes(damaged)
    yield
    path.write_bytes(content)


def test_checksums_cover_every_byte_of_every_file(run: dict[str, Any]):
    folder = checkpoint_of(run)
    checksums = read_checksums(folder)
    assert checksums is not None
    names = {path.relative_to(folder).as_posix() for path in files_of(folder)}
    assert set(checksums.blocks) == names - {"CHECKSUMS"}
    assert {"source/config.json", ".metadata", "__1_1.distcp", "config.yaml"} <= names
    for name, blocks in checksums.blocks.items():
        end = 0
        for block in sorted(blocks.values(), key=lambda block: block.offset):
            assert block.offset == end
            end += block.length
        assert end == (folder / name).stat().st_size
        checksums.check_file(name)


def test_only_our_checksum_is_computed(run: dict[str, Any]):
    """Without the option of the thread that writes, torch computes a CRC32 too."""
    folder = checkpoint_of(run)
    checksums = read_checksums(folder)
    assert checksums is not None
    for name, blocks in checksums.blocks.items():
        if name.endswith(".distcp"):
            content = (folder / name).read_bytes()
            for block in blocks.values():
                tensor = content[block.offset : block.offset + block.length]
                with zipfile.ZipFile(io.BytesIO(tensor)) as file:
                    (data,) = (one for one in file.infolist() if one.filename.endswith("data/0"))
                assert data.CRC == 0 != zlib.crc32(tensor)


def test_a_resume_refuses_a_flipped_bit_in_any_file(run: dict[str, Any]):
    run_on_ranks(_resumes_refuse, run, world_size=2)


def _resumes_refuse(world: World, settings: dict[str, Any]) -> None:
    """Damage one file after the other, and try to resume each time."""
    config = build(RunConfig, settings)
    folder = checkpoint_of(settings)
    for path in files_of(folder):
        if world.rank == 0:
            damage = flipped(path, share=0.5)
            next(damage)
        dist.barrier()
        destroy_model_parallel()  # of the attempt before
        with pytest.raises(CheckpointError) as error:
            train(config, world)
        assert str(path) in str(error.value), f"{path}: {error.value}"
        way_out = f"\n  write step_00000001 into {folder.parent / 'latest'} to resume from it"
        assert str(error.value).endswith(way_out), str(error.value)
        dist.barrier()
        if world.rank == 0:
            list(damage)
        dist.barrier()
    assert newest(config.run.dir) == folder


def test_a_resume_refuses_a_pipe_in_place_of_a_file(run: dict[str, Any]):
    run_on_ranks(_resumes_refuse_pipes, run, world_size=2)


def _resumes_refuse_pipes(world: World, settings: dict[str, Any]) -> None:
    config, folder = build(RunConfig, settings), checkpoint_of(settings)
    for name in ("__0_0.distcp", "__1_1.distcp", ".metadata", "config.yaml"):
        path, content = folder / name, (folder / name).read_bytes()
        dist.barrier()
        with named_pipe(path) if world.rank == 0 else contextlib.nullcontext():
            dist.barrier()
            destroy_model_parallel()  # of the attempt before
            with pytest.raises(CheckpointError, match=r"named pipe \(FIFO\)") as error:
                train(config, world)
            assert str(path) in str(error.value), str(error.value)
            dist.barrier()
        if world.rank == 0:
            path.write_bytes(content)
        dist.barrier()


def test_an_export_refuses_a_flipped_bit(run: dict[str, Any], tmp_path: Path):
    folder = checkpoint_of(run)
    weights = {
        stored.relative_path: stored.offset + stored.length // 2
        for index, stored in (SafeReader(folder).read_metadata().storage_data or {}).items()
        if not index.fqn.startswith("optimizer.")
    }
    assert len(weights) == 4, "each rank writes two files"
    for path in files_of(folder):
        last = path.stat().st_size - 1
        share = weights.get(path.name, last // 2) / last
        for _ in flipped(path, share=share):
            with pytest.raises(CheckpointError, match=re.escape(f"{path} ")) as error:
                export_checkpoint(folder, tmp_path / "hf")
            assert "\n  write step_00000001 into" in str(error.value)
        assert not (tmp_path / "hf").exists()


def test_a_checkpoint_without_checksums_is_read(run: dict[str, Any], tmp_path: Path):
    """As version 0.1 wrote it."""
    old = tmp_path / "run"
    shutil.copytree(run["run"]["dir"], old)
    as_of_version_0_1(old)
    lines = run_training({**run, "run": {**run["run"], "dir": str(old)}}, world_size=2)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert read_checksums(step_folder(old, 2)) is None
    assert read_checksums(step_folder(old, 3)) is not None


def test_a_checkpoint_that_lost_its_checksums_is_refused(run: dict[str, Any], tmp_path: Path):
    lost = tmp_path / "run"
    shutil.copytree(run["run"]["dir"], lost)
    (step_folder(lost, 2) / "CHECKSUMS").unlink()
    with pytest.raises(CheckpointError, match=r"CHECKSUMS is missing[^\n]*\n  write step_00000001"):
        export_checkpoint(lost, tmp_path / "hf", dtype="float32")
    (result, *_) = verify(step_folder(lost, 2), lambda *_: None)
    assert "CHECKSUMS is missing" in result.problems[0]


def test_a_run_that_lost_latest_says_what_it_will_replace(
    run: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    lost = tmp_path / "run"
    shutil.copytree(run["run"]["dir"], lost)
    (lost / "checkpoints" / "latest").unlink()
    run_training({**run, "run": {**run["run"], "dir": str(lost)}}, world_size=2)
    said = " ".join(capfd.readouterr().out.split())
    assert "so this run starts at step 0" in said
    assert "step_00000001, step_00000002 when it reaches their steps" in said


def test_torch_marks_the_bounds_of_each_tensor(tmp_path: Path):
    """It calls tell() around each tensor; checksums rely on this."""
    files = hashing._HashingFiles()
    with files.create_stream(tmp_path / "file", "wb") as stream:
        assert stream.tell() == 0
        torch.save(torch.arange(1000), stream)
        first = stream.tell()
        torch.save(torch.arange(10), stream)
        second = stream.tell()
    assert set(files.checksums) == {("file", 0, first), ("file", first, second - first)}
    blocks = {
        "file": {
            start: Block(start, length, digest)
            for (_, start, length), digest in files.checksums.items()
        }
    }
    write_checksums(tmp_path, blocks)
    written = read_checksums(tmp_path)
    assert written is not None
    written.check_file("file")
