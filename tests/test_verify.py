"""Tests of ``megatron-moe verify``: every flipped bit is found, and nothing else."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from commands import run_command
from named_pipes import named_pipe
from old_checkpoints import as_of_version_0_1
from safetensors.torch import load_file, save_file
from tiny import save_dense
from training_runs import run_training, tree, write_tokens
from transformers import AutoModelForCausalLM

from megatron_moe.checkpoint.folder import newest, replaced_by, step_folder
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.verify import verify
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import write_checksums
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
        assert [str(path) in p for p in problems_of(folder)] == [True]
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
    (tmp_path / "hf" / ".gitattributes").write_text("")
    noted = run_command("verify", tmp_path / "hf")
    assert noted.returncode == 0
    assert "\n  note: hidden and not listed in CHECKSUMS: .gitattributes\n" in noted.stdout
    (tmp_path / "hf" / "config.json").write_text("{}")
    bad = run_command("verify", tmp_path / "hf", "--json")
    assert bad.returncode == 2
    (result,) = json.loads(bad.stdout)
    assert "config.json is damaged" in result["problems"][0]
    assert bad.stderr.startswith("CheckpointError: ")
    assert "Traceback" not in bad.stderr


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def notes_of(folder: Path) -> list[str]:
    return [note for result in verify(folder, lambda *_: None) for note in result.notes]


@pytest.mark.parametrize("name", ["extra.json", "source/extra.json", "new/deep/extra.json"])
def test_a_file_that_checksums_do_not_list_is_named_and_not_counted(copy: Path, name: str):
    for folder in (copy / "hf", step_folder(copy, 1)):
        (before,) = verify(folder, lambda *_: None)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
        (after,) = verify(folder, lambda *_: None)
        assert (after.files, after.num_bytes) == (before.files, before.num_bytes)
        assert len(after.problems) == 1
        assert f"{folder} has files that are not listed in CHECKSUMS" in after.problems[0]
        assert f": {name}.\n  move them out" in after.problems[0]


def test_hidden_files_are_noted(copy: Path):
    """The Hub adds .gitattributes to an export, and no program loads it."""
    (copy / "hf" / ".gitattributes").write_text("")
    assert problems_of(copy / "hf") == []
    assert notes_of(copy / "hf") == ["hidden and not listed in CHECKSUMS: .gitattributes"]


def test_without_checksums_only_weights_are_counted(tmp_path: Path):
    folder = save_dense(tmp_path / "dense")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (result,) = verify(folder, lambda *_: None)
    size = (folder / "model.safetensors").stat().st_size
    assert (result.files, result.num_bytes) == (1, size)
    assert "original/params.json" in result.notes[0]
    assert "not checked, for lack of checksums: " in result.notes[0]
    assert result.summary().startswith(f"{folder}: no damage found (1 file, ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("step_00000099", "names step_00000099, but .* is not a complete checkpoint"),
        ("2", "names '2', which is not a checkpoint next to it"),
        ("", "names '', which is not a checkpoint next to it"),
        (None, r"is missing: the run would start again at step 0 and replace its checkpoints, "
         r"step_00000001, step_00000002\.\n  write step_00000002 into"),
    ],
    ids=["no_such_step", "a_number", "empty", "missing"],
)  # fmt: skip
def test_a_latest_from_which_no_resume_starts_is_named(
    copy: Path, content: str | None, expected: str
):
    latest = copy / "checkpoints" / "latest"
    latest.unlink() if content is None else latest.write_text(content)
    (problem,) = problems_of(copy)
    assert re.search(f"{re.escape(str(latest))} {expected}", problem), problem
    if content is not None:
        assert "until then, a resume ends with this error" in problem
        assert ", such as step_00000002, or remove " in problem
        with pytest.raises(CheckpointError, match=expected):  # as a resume does
            newest(copy)


@pytest.mark.parametrize("kind", ["folder", "link_to_a_checkpoint", "broken_link"])
def test_a_latest_that_is_no_file_is_named(copy: Path, kind: str):
    latest = copy / "checkpoints" / "latest"
    latest.unlink()
    if kind == "folder":
        latest.mkdir()
    else:
        latest.symlink_to("step_00000002" if kind == "link_to_a_checkpoint" else "step_00000099")
    (problem,) = problems_of(copy)
    assert f"{latest} must be a text file with the name of a checkpoint" in problem
    with pytest.raises(CheckpointError, match="must be a text file with the name"):
        newest(copy)


def test_a_latest_that_names_an_older_checkpoint_is_noted(copy: Path):
    (copy / "checkpoints" / "latest").write_text("step_00000001\n")
    assert problems_of(copy) == []
    (note,) = notes_of(copy)
    assert "names step_00000001, not the newest checkpoint: a resume starts there" in note
    assert note.endswith(f"write step_00000002 into {copy / 'checkpoints' / 'latest'}")


def test_the_checkpoint_of_a_killed_replacement_is_verified(copy: Path):
    hidden = replaced_by(step_folder(copy, 2))
    step_folder(copy, 2).rename(hidden)
    assert problems_of(copy) == []
    assert f"a resume starts from {hidden}" in notes_of(copy)[0]
    (hidden / "config.yaml").write_text("")
    assert str(hidden / "config.yaml") in problems_of(copy)[0]


def test_a_checkpoint_without_checkpoint_json_is_named(copy: Path):
    folder = step_folder(copy, 1)
    (folder / "checkpoint.json").unlink()
    assert [str(folder / "checkpoint.json") in problem for problem in problems_of(copy)] == [True]
    shutil.rmtree(folder)
    folder.mkdir()
    assert f"{folder} is not a complete checkpoint" in problems_of(copy)[0]


def test_an_export_that_lost_its_checksums_is_damaged(copy: Path):
    folder = copy / "hf"
    (folder / "CHECKSUMS").unlink()
    (problem,) = problems_of(folder)
    assert f"{folder / 'CHECKSUMS'} is missing: model.safetensors says" in problem
    assert "\n  copy CHECKSUMS from where this folder was copied from, or export" in problem
    AutoModelForCausalLM.from_pretrained(folder)  # other programs read it
    again = folder.with_name("saved_again")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    assert problems_of(again) == []


def test_an_export_of_an_earlier_version_may_have_lost_its_checksums(copy: Path):
    """Its weights do not state that they had any."""
    folder = copy / "hf"
    (folder / "CHECKSUMS").unlink()
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    assert problems_of(folder) == []
    assert "An earlier version wrote it, with or without that file" in notes_of(folder)[1]


@pytest.mark.parametrize("of", ["checkpoint", "export", "source"])
def test_a_pipe_is_refused_before_anything_is_read(copy: Path, tmp_path: Path, of: str):
    of_kind = {"checkpoint": step_folder(copy, 2), "export": copy / "hf"}
    folder = of_kind[of] if of != "source" else save_dense(tmp_path / "dense")
    for name in ("config.json", "extra", "CHECKSUMS"):
        copied = tmp_path / f"copy-{name}"
        shutil.copytree(folder, copied)
        with named_pipe(copied / name), pytest.raises(CheckpointError) as error:
            verify(copied, lambda *_: pytest.fail("something was read"))
        assert f"cannot read {copied / name}: it is a named pipe (FIFO)" in str(error.value)


def test_an_export_refuses_a_pipe_in_a_checkpoint(copy: Path, tmp_path: Path):
    shard = sorted(step_folder(copy, 2).glob("*.distcp"))[0]
    for path in (shard, step_folder(copy, 2) / "source" / "config.json"):
        with named_pipe(path), pytest.raises(CheckpointError, match=r"named pipe \(FIFO\)"):
            export_checkpoint(copy, tmp_path / "out")
        shutil.copy(step_folder(copy, 1) / path.relative_to(step_folder(copy, 2)), path)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (b"9b00c1a2d3e4f501 0 5 /etc/passwd\n", "lists '/etc/passwd', which is outside"),
        (b"9b00c1a2d3e4f501 0 5 a/../../x\n", "lists 'a/../../x', which is outside"),
        (b"hello\n", "has a line that is no checksum: 'hello'"),
        (b"9b00c1a2d3e4f501 0 5 config.json\n", "lists byte 0 of 'config.json' twice"),
        (b"9b00c1a2d3e4f501 0 5 \xff\n", "No such file or directory"),
        (b"9b00c1a2d3e4f501 0 5 " + 5000 * b"a" + b"\n", "File name too long"),
    ],
    ids=["absolute", "parent", "no_checksum", "twice", "not_utf8", "too_long"],
)
def test_lines_that_no_export_writes_are_named(copy: Path, added: bytes, expected: str):
    """Whoever changes CHECKSUMS on purpose can compute its own checksum too."""
    path = copy / "hf" / "CHECKSUMS"
    text = path.read_bytes().partition(b"\n")[2] + added
    title = f"megatron_moe checksums 1 xxh3_64 {xxhash.xxh3_64_hexdigest(text)}\n"
    path.write_bytes(title.encode() + text)
    assert expected in problems_of(copy / "hf")[0]


def test_checksums_of_terabytes_are_not_read(copy: Path):
    path = copy / "hf" / "CHECKSUMS"
    os.truncate(path, 2**41)  # a hole, which takes no space
    assert f"{path} is damaged: it has {2**41} bytes" in problems_of(copy / "hf")[0]


def test_links_in_circles_and_to_nothing_are_named(copy: Path):
    folder = copy / "hf"
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    (folder / "up").symlink_to("..")
    (folder / "gone").symlink_to("nothing")
    problems = "\n".join(problems_of(folder))
    for expected in (
        f"cannot read {folder / 'a'}: Too many levels", f"{folder / 'gone'} is a link to nothing",
        "not listed in CHECKSUMS, so that nothing tells whether they belong there: up.",
    ):  # fmt: skip
        assert expected in problems


def test_names_that_are_not_utf8_are_printed(copy: Path):
    folder = copy / os.fsdecode(b"h\xff")
    (copy / "hf").rename(folder)
    assert run_command("verify", folder).returncode == 0
    (folder / os.fsdecode(b"tok\xfe\nx")).touch()
    done = run_command("verify", folder)
    assert done.returncode == 2
    assert "tok\\udcfe\\nx" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_with_a_name_that_is_not_utf8_is_intact(tmp_path: Path):
    (tmp_path / os.fsdecode(b"tokenizer\xff\x0c\xe2\x80\xa8")).write_text("x")
    (tmp_path / "config.json").write_text("{}")
    write_checksums(tmp_path, {})
    assert problems_of(tmp_path) == []


def test_nothing_at_a_path_is_reported_with_similar_names(copy: Path):
    for path in (copy.with_name("rum"), copy.with_name("rum") / "checkpoints" / "step_00000001"):
        with pytest.raises(CheckpointError) as error:
            verify(path, lambda *_: None)
        assert str(error.value) == (
            f"there is nothing at {path}.\n  check the path; near it: {copy}"
        )


def test_what_cannot_be_verified_names_what_can(copy: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    export, a_file = copy / "hf", "is a file that is not a plan.\n.*, verify its folder:"
    expected = {
        tmp_path / "empty": "is an empty folder: there is nothing to verify",
        tmp_path / "new": "is a run without a checkpoint: there is nothing to verify yet",
        copy / "checkpoints": f"is a part of a run.\n  verify the run: {copy}",
        export / "model.safetensors": f"{a_file} {export}",
        copy / "config.yaml": f"{a_file} {copy}",
        tmp_path: f"is neither a run.*\n  verify what is in it: {copy}",
    }
    for path, message in expected.items():
        with pytest.raises(CheckpointError, match=f"^{path} {message}$"):
            verify(path, lambda *_: None)
