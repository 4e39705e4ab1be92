"""Every command that writes: on a full, a read-only or an inode-less disk it fails in words.

The disks are tmpfs mounts of their own. Nothing that a reader would take for a whole file is left.
`WRITES` lists all modules that write, so that a new one needs a row here.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from commands import run_command
from disks import Disk, missing
from recovery import Record, told
from tiny import save_dense, save_tokenizer
from training_runs import run_training, tree, write_tokens

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

FULL = (Disk.fill, r"no space left on the disk of \S+/(disk|run/tokens)/?\S*: .*0\.0 MiB free")
NO_INODES = (Disk.take_inodes, r"no inodes left on the disk of \S+/disk/?\S*: it can hold no more")
READ_ONLY = (Disk.read_only, "read-only")
CONVERSATION = (
    '{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}\n'
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, text, and a configuration of a run that has one checkpoint."""
    root = tmp_path_factory.mktemp("source")
    text = root / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 2000)
    (root / "chat.jsonl").write_text(CONVERSATION * 200)
    save_dense(root / "dense", vocab_size=320)
    save_tokenizer(root / "dense", [text], chat_template=TEMPLATE)
    write_tokens(root / "tokens")
    settings = tree(
        root / "run", root / "dense", root / "tokens", train={"steps": 2},
        data={"validation_path": str(root / "tokens"), "validation_samples": 2},
    )  # fmt: skip
    run_training(settings, world_size=1)
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture
def disk(tmp_path: Path, source: Path) -> Iterator[Disk]:
    """Return a disk that holds a copy of the run."""
    with Disk(tmp_path / "disk", 16 * 2**20) as disk:
        subprocess.run(["cp", "-r", source / "run", disk.path / "run"], check=True)
        (disk.path / "out").mkdir()
        yield disk


def command(*words: object) -> subprocess.CompletedProcess[str]:
    if not str(words[0]).endswith(".py"):
        return run_command(*words, cwd=ROOT, timeout=300)
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False,
        timeout=300, cwd=ROOT,
    )  # fmt: skip


def trains(*changes: str) -> Callable[[Path, Path], tuple[object, ...]]:
    """Return a new run on the disk."""
    return lambda disk, source: (
        "train", source / "run.yaml", f"run.dir={disk / 'out' / 'run'}", *changes,
    )  # fmt: skip


def constructs(method: str, *changes: str) -> Callable[[Path, Path], tuple[object, ...]]:
    """Return a plan on the disk."""
    return lambda disk, source: (
        "construct", source / "run.yaml", f"upcycle.method={method}", "moe.moe_ffn_hidden_size=24",
        f"upcycle.plan={disk / 'out' / 'plan.safetensors'}", f"run.dir={source / 'constructing'}",
        *changes,
    )  # fmt: skip


def tokenizes(name: str, *changes: str) -> Callable[[Path, Path], tuple[object, ...]]:
    """Return a run of which only the tokens are on the disk."""

    def words(disk: Path, source: Path) -> tuple[object, ...]:
        run_dir = disk.parent / "run"
        run_dir.mkdir()
        (run_dir / "tokens").symlink_to(disk / "out")
        return (
            "train", source / "run.yaml", f"run.dir={run_dir}", f"data.path={source / name}",
            *changes,
        )  # fmt: skip

    return words


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "report": lambda disk, _: ("report", disk / "run"),
    "compare": lambda disk, source: (
        "compare", disk / "run", source / "run", "--out", disk / "out" / "compare.html",
    ),
    "analyze": lambda disk, _: ("analyze", disk / "run"),
    "evaluate": lambda disk, _: ("evaluate", disk / "run", "--json"),
    "export": lambda disk, _: ("export", disk / "run", "--out", disk / "out" / "hf"),
    "tokenize": lambda disk, source: (
        "tokenize", source / "text.jsonl", "--tokenizer", source / "dense",
        "--out", disk / "out" / "tokens",
    ),
    "reference-loss": lambda disk, source: (
        "reference-loss", source / "run.yaml", f"run.dir={source / 'reference'}",
        "--out", disk / "out" / "reference.json",
    ),
    "construct": constructs("split_coactivation", "measure.samples=2", "measure.interval=1"),
    "construct with fits": constructs(
        "split_coactivation", "measure.samples=8", "upcycle.fit=[router, down]",
    ),
    "init": lambda disk, _: (
        "init", "llama-3.2-3b", "--gpus", "8", "--tokens", "1B", "--out", disk / "out" / "run.yaml",
    ),
    "plan": lambda disk, _: (
        "plan", "--model", "llama-3.2-3b", "--gpus", "8", "--report", disk / "out" / "plan.html",
    ),
    "bench": lambda disk, source: (
        "bench", source / "run.yaml", f"run.dir={source / 'bench'}", "--steps", "1",
        "--warmup", "0", "--random", "--out", disk / "out" / "bench.json",
    ),
    "train": trains(),
    "train with TensorBoard": trains("log.tensorboard=true"),
    "train with a record": lambda disk, source: (
        "train", source / "run.yaml", f"run.dir={source / 'recorded'}",
        f"moe.record_routing={disk / 'out' / 'routing'}",
    ),
    "train on text": tokenizes("text.jsonl"),
    "train on conversations": tokenizes("chat.jsonl", "data.kind=chat"),
    "resume": lambda disk, source: (
        "train", source / "run.yaml", f"run.dir={disk / 'run'}", "train.steps=4",
        "guard.save_retry_seconds=0",
    ),
    "get_text": lambda disk, _: ("tools/get_text.py", disk / "out" / "text", "--offline"),
    "get_dense": lambda disk, source: (
        "tools/get_dense.py", disk / "out" / "dense", "--from", source / "dense",
    ),
}  # fmt: skip

# Rows of these modules: each calls what writes files.
WRITES = {
    "analyze/record.py": "analyze",
    "bench/record.py": "bench",
    "checkpoint/disks.py": "train with local copies",
    "checkpoint/folder.py": "resume",
    "checkpoint/rank_file.py": "train with local copies",
    "checkpoint/storage.py": "resume",
    "cli/plan.py": "bench",  # constants fitted to records, by the same function
    "commands/init.py": "init",
    "commands/resuming.py": "resume",
    "commands/train.py": "train",
    "construct/finished.py": "construct with fits",
    "construct/partial.py": "construct",
    "data/chat.py": "train on conversations",
    "data/corpus.py": "tokenize",
    "data/reference.py": "reference-loss",
    "data/tokens.py": "train on text",
    "data/writer.py": "tokenize",
    "evaluate/record.py": "evaluate",
    "experts/file.py": "construct",
    "experts/solved.py": "construct with fits",
    "hf/checksums.py": "export",
    "hf/disk.py": "report",
    "hf/load.py": "evaluate",  # links to the source's files, in a temporary folder
    "hf/writer.py": "export",
    "model/receipt.py": "train",
    "report/page.py": "report",
    "train/lock.py": "train",
    "train/metrics.py": "train",
    "train/routing_record.py": "train with a record",
    "train/sinks.py": "train with TensorBoard",
}
NO_DISK = {
    "log.py": "os.devnull",
    "runtime/memory.py": "a file of /proc",
    "runtime/world.py": "errors of local ranks, in a temporary folder",
}
WRITERS = ("write_text", "write_bytes", "save_file", "torch.save", "copyfile", "SummaryWriter")


def writes(path: Path) -> bool:
    """Return whether a module calls a function that writes a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            opens = name.endswith(".open") or name == "open"
            if name.endswith(WRITERS) or (opens and any(str(m)[:1] in "wa" for m in modes if m)):
                return True
            if name in ("os.open",) and "O_WRONLY" in ast.unparse(node):
                return True
    return False


def test_every_module_that_writes_has_a_row():
    package = ROOT / "megatron_moe"
    found = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if writes(p)}
    assert found == WRITES.keys() | NO_DISK.keys()
    assert set(WRITES.values()) <= COMMANDS.keys() | {"train with local copies"}


IN_EVERY_RUN = ("report", "export", "tokenize", "construct", "train", "resume", "get_dense")
CASES = [
    *((name, FULL) for name in COMMANDS),
    ("report", NO_INODES), ("train", NO_INODES), ("resume", NO_INODES), ("get_text", NO_INODES),
    ("export", READ_ONLY), ("train", READ_ONLY), ("resume", READ_ONLY), ("get_dense", READ_ONLY),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "state"),
    [
        pytest.param(
            name, state, id=f"{name}-{state[0].__name__}",
            marks=() if name in IN_EVERY_RUN else pytest.mark.slow,
        )
        for name, state in CASES
    ],
)  # fmt: skip
def test_a_disk_that_takes_nothing(
    disk: Disk,
    source: Path,
    name: str,
    state: tuple[Callable[[Disk], None], str],
    record_property: Record,
):
    before = {path: path.stat().st_mtime_ns for path in disk.path.rglob("*") if path.is_file()}
    spoil, words = state
    spoil(disk)
    done = command(*COMMANDS[name](disk.path, source))
    output = done.stdout + done.stderr
    assert done.returncode in (1, 2), output
    assert re.search(words, output), output
    assert "Traceback" not in output, output
    assert len(set(re.findall(r"^\w+Error: .*", output, re.MULTILINE))) == 1, output
    record_property("saw", told(output))
    left = {path for path in disk.path.rglob("*") if path.is_file()} - before.keys()
    whole = [p for p in left if p.name != "filler" and p.stat().st_size and p.suffix != ".jsonl"]
    assert [p for p in whole if p.name not in ("run.id", "lock")] == []
    empty = [path for path in disk.path.rglob(".*") if path.is_dir() and not any(path.iterdir())]
    assert empty == [], "nothing is left of what never began"
    _still_read(disk, source)


def _still_read(disk: Disk, source: Path) -> None:
    """Whatever happened, the run on the disk is what it was: all its files are whole."""
    disk.repair()
    for path in (source / "run").rglob("*"):
        copy = disk.path / "run" / path.relative_to(source / "run")
        if path.is_file() and path.suffix not in (".jsonl", ".html") and path.name != "lock":
            assert copy.exists(), copy
            if "checkpoints" in path.parts:
                assert copy.read_bytes() == path.read_bytes(), copy


@pytest.mark.slow
def test_local_copies_on_a_full_disk(
    disk: Disk, source: Path, tmp_path: Path, record_property: Record
):
    """A job does not start with one; if it fills up later, training continues."""
    words = (
        "train", source / "run.yaml", f"run.dir={tmp_path / 'run'}", "--ranks", "2",
        f"checkpoint.local_dir={disk.path / 'out'}", "checkpoint.local_interval=1",
        "checkpoint.interval=2",
    )  # fmt: skip
    disk.fill()
    refused = command(*words)
    assert refused.returncode == 2
    assert re.search(FULL[1], refused.stderr), refused.stderr
    assert not [p for p in (disk.path / "out").rglob("*") if p.is_file()]
    disk.repair()
    assert command(*words).returncode == 0
    subprocess.run(["mount", "-o", "remount,size=16m", disk.path], check=True)
    disk.fill()
    done = command(*words, "train.steps=5")
    output = refused.stderr + done.stdout + done.stderr
    assert "Traceback" not in output, output
    assert "Training continues; the last local copy stays." in done.stdout, output
    assert re.search(FULL[1], done.stdout), output
    assert done.returncode == 0, output
    record_property("saw", told(output))


def test_a_thin_disk_says_that_the_free_space_is_not_there(tmp_path: Path):
    """The file system has room, its storage does not."""
    from megatron_moe.hf.disk import refusal

    error = OSError(28, os.strerror(28))
    text = refusal(error, tmp_path, needed=1)
    assert re.search(r": 0\.0 MiB needed, .* free, but its storage has no more$", text), text
