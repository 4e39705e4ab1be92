"""Tests of ``megatron-moe verify``: every flipped bit is found, and nothing else."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from commands import run_command
from old_checkpoints import as_of_version_0_1
from safetensors.torch import save_file
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import step_folder
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.verify import verify
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.writer import FolderWriter

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with two checkpoints, and its export below it."""
    root = tmp_path_factory.mktemp("verify")
    dense, tokens = save_dense(root / "dense"), write_tokens(root / "tokens")
    (dense / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))
    settings = tree(
        root / "run", dense, tokens, train={"steps": 2}, checkpoint={"interval": 1},
        parallel={"expert_parallel_size": 2}, upcycle={"method": "split_clustered"},
        moe={"num_moe_experts": 4, "moe_ffn_hidden_size": 24},
    )  # fmt: skip
    run_training(settings, world_size=2)
    export_checkpoint(root / "run", root / "run" / "hf")
    return root / "run"


def problems_of(folder: Path) -> list[str]:
    return [problem for result in verify(folder, lambda *_: None) for problem in result.problems]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("of", ["checkpoint", "export"])
def test_every_flipped_bit_is_found_and_named(run_dir: Path, of: str):
    folder = step_folder(run_dir, 1) if of == "checkpoint" else run_dir / "hf"
    assert problems_of(folder) == []
    tried = 0
    for path in files_of(folder):
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            for bit in (1, 128):
                damaged = bytearray(content)
                damaged[place] ^= bit
                path.write_bytes(damaged)
                problems = problems_of(folder)
                if path.name == "CHECKSUMS":  # the line of another file may be what was changed
                    assert all("or its line in CHECKSUMS" in p or "no readable line" in p
                               for p in problems[1:]), problems  # fmt: skip
                else:
                    assert len(problems) == 1, (path, place, problems)
                assert str(path) in problems[0], (path, place, problems)
                tried += 1
        for changed in (content[:-1], content + b"x", b""):
            path.write_bytes(changed)
            named = [str(path) in problem for problem in problems_of(folder)]
            assert named == [True] or (path.name == "CHECKSUMS" and named[0])
            tried += 1
        path.unlink()
        assert path.name == "CHECKSUMS" or [str(path) in p for p in problems_of(folder)] == [True]
        path.write_bytes(content)
    assert problems_of(folder) == []
    assert tried >= 11 * len(files_of(folder)) > 40
    print(f"{of}: {tried} changes of {len(files_of(folder))} files, all found")  # for pytest -s


def test_damaged_checksums_hide_no_other_damage(run_dir: Path, tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(run_dir / "hf", folder)
    title, _, lines = (folder / "CHECKSUMS").read_text().partition("\n")
    (folder / "CHECKSUMS").write_text(f"{title[:-1]}x\n{lines}")
    assert [str(folder / "CHECKSUMS") in problem for problem in problems_of(folder)] == [True]
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    problems = problems_of(folder)
    assert len(problems) == 2
    assert f"{weights} is damaged" in problems[1]
    without_config = "".join(x for x in lines.splitlines(True) if "config.json" not in x)
    (folder / "CHECKSUMS").write_text(f"{title}\n{without_config}")
    assert "no readable line for config.json" in problems_of(folder)[2]


def test_the_receipt_identifies_the_source(run_dir: Path):
    """The oracle is xxhash itself, over each file in one piece."""
    dense = run_dir.parent / "dense"
    files = json.loads((run_dir / "receipt.json").read_text())["source_files"]
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"]
    paths = [dense / name for name in names]
    assert files == [
        {
            "path": str(path), "bytes": path.stat().st_size,
            "xxh3_64": xxhash.xxh3_64_hexdigest(path.read_bytes()),
        }
        for path in paths
    ]  # fmt: skip
    assert problems_of(run_dir) == []
    weights = paths[2]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [p.partition(" is not what ")[0] for p in problems_of(run_dir)] == [str(weights)]
    weights.rename(dense / "away")  # a source may be removed after the upcycling
    assert problems_of(run_dir) == []
    (dense / "away").unlink()
    weights.write_bytes(content)


def test_shards_of_an_export_have_one_checksum_for_each_tensor(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(50, 3 * i, generator=generator) for i in range(4)}
    announced = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with FolderWriter(tmp_path / "hf", announced, max_shard_bytes=1500) as writer:
        for name in reversed(tensors):  # in any order
            writer.write(name, tensors[name])
        writer.add_file("config.json", b"{}")
    assert problems_of(tmp_path / "hf") == []
    lines = (tmp_path / "hf" / "CHECKSUMS").read_text().splitlines()[1:]
    shards = [line for line in lines if line.endswith(".safetensors")]
    assert len(shards) == 3 + 3, "three headers, and three tensors with elements"


def test_a_run_is_verified_with_all_its_checkpoints(run_dir: Path):
    results = verify(run_dir, lambda *_: None)
    names = [result.folder.name for result in results]
    assert names == ["latest", "step_00000001", "step_00000002", "plan.safetensors", "dense"]
    compared = [result.compared_with for result in results]
    copy = "the newest checkpoint's copy"
    receipt = str(run_dir / "receipt.json")
    assert compared == ["the checkpoints next to it", "CHECKSUMS", "CHECKSUMS", copy, receipt]


def test_a_flipped_bit_of_a_runs_plan_is_named(run_dir: Path):
    """Also where no table is: in the words of its header."""
    plan = run_dir / "plan.safetensors"
    content = plan.read_bytes()
    for place in (0, content.index(b"measured_on"), len(content) - 1):
        plan.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert [str(plan) in problem for problem in problems_of(run_dir)] == [True]
    plan.write_bytes(content)


def test_progress_ends_at_the_total(run_dir: Path):
    shown: list[tuple[int, int]] = []
    verify(run_dir, lambda done, total: shown.append((done, total)))
    assert shown == sorted(shown)
    assert shown[-1][0] == shown[-1][1]


def test_a_checkpoint_of_version_0_1_is_read(run_dir: Path, tmp_path: Path):
    old = tmp_path / "run"
    shutil.copytree(run_dir, old)
    as_of_version_0_1(old)
    (result,) = verify(step_folder(old, 1), lambda *_: None)
    assert result.problems == []
    assert result.compared_with.startswith("no checksums: ")
    shard = sorted(step_folder(old, 1).glob("*.distcp"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    assert all(str(shard) in problem for problem in problems_of(step_folder(old, 1)))
    assert problems_of(step_folder(old, 1))


def test_a_source_with_nan_or_a_missing_end_is_named(tmp_path: Path):
    folder = save_dense(tmp_path / "dense")
    (result,) = verify(folder, lambda *_: None)
    assert (result.kind, result.problems) == ("model", [])
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    assert "is truncated" in problems_of(folder)[0]
    save_file({"w": torch.tensor([[1.0, float("nan")]])}, weights)
    assert "w must be finite" in problems_of(folder)[0]


def test_the_hubs_cache_is_compared_with_its_sha256(tmp_path: Path):
    folder = save_dense(tmp_path / "dense")
    weights, blobs = folder / "model.safetensors", tmp_path / "blobs"
    blobs.mkdir()
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    assert problems_of(folder) == []
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1  # a finite value that is slightly another
    blob.write_bytes(content)
    assert f"{weights} is damaged: its SHA-256 is" in problems_of(folder)[0]


def test_the_command_reports_and_exits(run_dir: Path, tmp_path: Path):
    good = run_command("verify", run_dir / "hf")
    assert good.returncode == 0, good.stderr
    assert f"{run_dir / 'hf'}: intact (" in good.stdout
    shutil.copytree(run_dir / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{}")
    bad = run_command("verify", tmp_path / "hf", "--json")
    assert bad.returncode == 2
    (result,) = json.loads(bad.stdout)
    assert "config.json is damaged" in result["problems"][0]
    assert bad.stderr.startswith("CheckpointError: ")
    assert "Traceback" not in bad.stderr


def test_a_folder_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is neither a run with checkpoints, nor"):
        verify(tmp_path, lambda *_: None)
