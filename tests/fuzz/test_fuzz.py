"""Damaged and hostile files: reading one succeeds, or ends in a UserError.

Never a traceback, never memory beyond ten times the file, no write outside the folder, no process,
no connection. Each file that the project reads is mutated by hypothesis, which shrinks what fails.
`make test` takes a fixed handful of mutations of each file; `make fuzz` searches for ten minutes.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from old_checkpoints import as_of_version_0_1
from tiny import save_dense, save_tokenizer
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import (
    find_checkpoint,
    read_config,
    read_progress,
    source_copy,
    step_folder,
)
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.load import build, load
from megatron_moe.config.run import RunConfig
from megatron_moe.data.documents import ReadPosition, read_blocks
from megatron_moe.data.messages import parse_dialogue
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.errors import UserError
from megatron_moe.experts.file import read_plan, write_plan
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import read_spec
from megatron_moe.json_text import parse_json
from megatron_moe.report.read import read_run

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""Seconds of searching, over all files; 0 tries `EXAMPLES` fixed mutations of each."""
EXAMPLES = 40
MEMORY_FACTOR, MEMORY_FLOOR = 10, 64 << 20
"""A file of a few bytes may still import a module or grow the heap once."""

ODD_JSON: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 999,
    "\ud800", "../../etc/passwd", "/etc/passwd", [], {}, [[]], {"": {}}, [None], "1", "1e-5",
]  # fmt: skip
ALIASES = b"a: &a [x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (here, here, b",".join([b"*%c" % before] * 20))
    for before, here in pairwise(b"abcdefgh")
)
"""YAML of 600 bytes that expands to a billion values."""
ODD_BYTES = [
    ALIASES,
    b"", b"\0", b"\xff", b"\x80", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"}", b"[" * 2000,
    b"9" * 400, b"1e999", b"NaN", b"null", b": ", b"- ", b"&a *a", b"!!python/name:os.getcwd",
    b"cos\nsystem\n(S'touch pwned'\ntR.", b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"..",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A file that the project reads."""

    file: str
    """Path of the file below the stage's folder."""
    read: Callable[[Path], object]
    """Reads it as a command does, given the stage's folder."""


def tensors(folder: Path) -> None:
    spec = read_spec(folder / "dense")
    checkpoint = open_safetensors(folder / "dense")
    checkpoint.check_tensors(dict(dense_tensors(spec)))


def shards(folder: Path) -> None:
    checkpoint = open_safetensors(folder / "shards")
    checkpoint.check_tensors(dict(dense_tensors(read_spec(folder / "shards"))))


def tokenizer(folder: Path) -> None:
    load_tokenizer(folder / "dense").encode("A text of this day: 1 + 1.")


def empty_plan(folder: Path) -> ExpertPlan:
    changes = {"upcycle": {"method": "split_coactivation"}, "moe": {"moe_ffn_hidden_size": 24}}
    config = build(RunConfig, tree(folder / "run", folder / "dense", folder / "tokens", **changes))
    return make_expert_plan(read_spec(folder / "dense"), config.moe, config.upcycle)


def plan(folder: Path) -> None:
    read_plan(folder / "plan.safetensors", empty_plan(folder), source="0" * 64)


def checkpoint(folder: Path) -> None:
    path = find_checkpoint(folder / "run")
    read_config(path)
    read_progress(path)
    read_spec(source_copy(path))
    with GlobalTensors(path) as stored:
        stored.read("decoder.final_layernorm.weight", index=None, dtype=torch.float32)


def whole_export(folder: Path) -> None:
    shutil.rmtree(folder / "hf", ignore_errors=True)
    export_checkpoint(folder / "run", folder / "hf")


def documents(folder: Path, name: str) -> None:
    for _ in read_blocks([folder / name], text_key="text", start=ReadPosition()):
        pass


def conversations(folder: Path) -> None:
    for line in (folder / "chat.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # what it raises; the caller adds file and line
            parse_dialogue(line)


STEP = "run/checkpoints/step_00000002"
TARGETS = [
    Target("dense/config.json", lambda folder: read_spec(folder / "dense")),
    Target("dense/model.safetensors", tensors),
    Target("shards/model.safetensors.index.json", shards),
    Target("dense/tokenizer.json", tokenizer),
    Target("dense/tokenizer_config.json", tokenizer),
    Target("plan.safetensors", plan),
    Target("run/checkpoints/latest", checkpoint),
    Target(f"{STEP}/checkpoint.json", checkpoint),
    Target(f"{STEP}/config.yaml", checkpoint),
    Target(f"{STEP}/source/config.json", checkpoint),
    Target(f"{STEP}/CHECKSUMS", checkpoint),
    Target(f"{STEP}/.metadata", checkpoint),
    Target(f"{STEP}/__0_0.distcp", whole_export),
    Target("run.yaml", lambda folder: load(RunConfig, folder / "run.yaml", [])),
    Target("text.jsonl", lambda folder: documents(folder, "text.jsonl")),
    Target("text.txt", lambda folder: documents(folder, "text.txt")),
    Target("chat.jsonl", conversations),
    Target("run/metrics.jsonl", lambda folder: read_run(folder / "run")),
]
CHANGED_WITHOUT = ("CHECKSUMS", "checkpoint.json")
WITHOUT_CHECKSUMS = ("checkpoint.json", "config.yaml", "source/config.json", ".metadata", "__0_0")
"""Files of a checkpoint that are read as version 0.1 wrote them, or the checksum says it all."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one of every file that the project reads."""
    folder = tmp_path_factory.mktemp("fuzz")
    text = folder / "text.txt"
    text.write_text("one\n\ntwo lines\nof text\n" * 20)
    save_dense(folder / "dense")
    save_tokenizer(folder / "dense", [text])
    save_dense(folder / "shards")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    model.save_pretrained(folder / "shards", max_shard_size="200KB")
    (folder / "shards" / "model.safetensors").unlink()
    write_tokens(folder / "tokens")
    train = tree(folder / "run", folder / "dense", folder / "tokens", train={"steps": 2})
    run_training(train, world_size=1)
    (folder / "run.yaml").write_text((folder / STEP / "config.yaml").read_text())
    neurons = LayerTable(neurons_EM=np.arange(96).reshape(4, 24))
    made = empty_plan(folder).with_tables(dict.fromkeys(range(4), neurons))
    write_plan(folder / "plan.safetensors", made, source="0" * 64)
    (folder / "text.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 3}\n' * 5)
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return folder


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of a file: bytes at a place, or a value of a JSON document."""

    kind: str
    place: float
    """Position, as a fraction of the file or of the document's values."""
    length: int
    value: Any

    def apply(self, content: bytes) -> bytes:
        if self.kind == "json":
            return _with_json_value(content, self.place, self.value)
        at = int(self.place * len(content))
        if self.kind == "cut":
            return content[:at]
        if self.kind == "flip":
            return (
                content[:at] + bytes([content[at] ^ self.length]) + content[at + 1 :]
                if content[at:]
                else content
            )
        if self.kind == "repeat":
            return content[:at] + content[at : at + self.length] * 3 + content[at + self.length :]
        return (
            content[:at]
            + self.value
            + content[at + (self.length if self.kind == "replace" else 0) :]
        )


def _with_json_value(content: bytes, place: float, value: Any) -> bytes:
    """Replace one value of a JSON document, of the header of a safetensors file, or of a line."""
    start = 8 if content[8:9] == b"{" else 0
    end = 8 + int.from_bytes(content[:8], "little") if start else len(content)
    try:
        document = parse_json(content[start:end])
    except ValueError:
        lines = content.split(b"\n")
        at = int(place * len(lines))
        return (
            content
            if len(lines) < 2
            else b"\n".join(
                _with_json_value(line, place * len(lines) - at, value) if i == at else line
                for i, line in enumerate(lines)
            )
        )
    places = list(_places(document))
    if not places:
        return json.dumps(value).encode()
    container, key = places[int(place * len(places))]
    container[key] = value
    text = json.dumps(document).encode()
    return (len(text).to_bytes(8, "little") if start else b"") + text + content[end:]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        yield value, key
        yield from _places(child)


FRACTION = st.floats(0, 1, exclude_max=True)
LENGTH = st.integers(1, 255)
MUTATIONS = st.lists(
    st.one_of(
        st.builds(Mutation, st.just("json"), FRACTION, LENGTH, st.sampled_from(ODD_JSON)),
        st.builds(Mutation, st.sampled_from(("insert", "replace")), FRACTION, LENGTH,
                  st.one_of(st.sampled_from(ODD_BYTES), st.binary(max_size=16))),
        st.builds(Mutation, st.sampled_from(("cut", "flip", "repeat")), FRACTION, LENGTH,
                  st.none()),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


class _Watch:
    """Notices forbidden acts through Python's audit events; a hook stays until the process ends."""

    allowed: Path | None = None
    seen: ClassVar[list[str]] = []

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.allowed is None:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork",
                     "socket.connect"):  # fmt: skip
            cls.seen.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, mode = Path(os.fsdecode(arguments[0])), arguments[1] or ""
            writes = any(letter in mode for letter in "wax+")
            if writes and cls.allowed not in path.absolute().parents and path != Path(os.devnull):
                cls.seen.append(f"writes {path}")


sys.addaudithook(_Watch.hook)


@contextlib.contextmanager
def _watched(folder: Path, size: int) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    _Watch.allowed, _Watch.seen = folder, []
    try:
        yield
    finally:
        _Watch.allowed = None
    assert _Watch.seen == []
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    assert grown <= MEMORY_FACTOR * size + MEMORY_FLOOR, f"{grown >> 20} MiB for {size} bytes"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.file.replace("/", "-"))
def test_reading_succeeds_or_is_refused(stage: Path, target: Target):
    path = stage / target.file
    target.read(stage)  # imports what it needs, and shows that the undamaged file is read
    counts: Counter[str] = Counter()
    with _without_checksums(stage, target):
        _damage(path, target, stage, counts)
    assert step_folder(stage / "run", 2).is_dir()
    if SECONDS:  # shown by pytest -s
        print(f"{target.file}: {counts['tried']} damaged files, {counts['refused']} refused")


def _damage(path: Path, target: Target, stage: Path, counts: Counter[str]) -> None:
    """Damage a file at random, read it, count the tries, and restore it."""
    content = path.read_bytes()

    @settings(
        max_examples=EXAMPLES if not SECONDS else 500, database=None,
        suppress_health_check=list(HealthCheck), derandomize=not SECONDS,
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(MUTATIONS)
    def check(mutations: list[Mutation]) -> None:
        damaged = content
        for mutation in mutations:
            damaged = mutation.apply(damaged)
        path.write_bytes(damaged)
        counts["tried"] += 1
        with _watched(stage, len(damaged)):
            try:
                target.read(stage)
            except UserError:
                counts["refused"] += 1

    try:
        end = time.monotonic() + SECONDS / len(TARGETS)
        for attempt in range(10**6):
            (seed(attempt)(check) if SECONDS else check)()
            if time.monotonic() >= end:
                break
    finally:
        path.write_bytes(content)


@contextlib.contextmanager
def _without_checksums(stage: Path, target: Target) -> Iterator[None]:
    """Take a checkpoint's checksums away, so that the reader itself must notice the damage."""
    name = target.file.removeprefix(STEP + "/")
    if not name.startswith(WITHOUT_CHECKSUMS) or not target.file.startswith(STEP):
        yield
        return
    step = (stage / STEP).parent.glob("step_*/*")
    held = {path: path.read_bytes() for path in step if path.name in CHANGED_WITHOUT}
    as_of_version_0_1(stage / "run")
    try:
        yield
    finally:
        for path, content in held.items():
            path.write_bytes(content)
