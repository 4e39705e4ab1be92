"""Verify a checkpoint, a model or a plan: read every byte once and report what is damaged."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.folder import checksums_of, complete
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.commands.verify_plan import (
    files_of_plan,
    plan_at,
    problems_of_plan,
    problems_of_runs_plan,
)
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import PLAN_FILE
from megatron_moe.hf.checksums import (
    FILE,
    Checksums,
    file_checksum,
    read_checksums,
    readable_checksums,
)
from megatron_moe.hf.header import TensorInfo, read_headers
from megatron_moe.hf.values import check_finite, mapped_rows
from megatron_moe.hf.windows import windows
from megatron_moe.json_text import parse_json

_SHA256 = re.compile(r"[0-9a-f]{64}")

Seen = Callable[[int, int], None]
"""Called with the bytes read so far and their total."""


@dataclass(slots=True)
class Verified:
    """Result for one folder."""

    folder: Path
    kind: str
    """``checkpoint``, ``model`` (an export or a source), ``plan``, ``plan of a run``, or ``source
    of a run``."""
    compared_with: str
    """Origin of the expected contents, in words."""
    files: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the result for scripts."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "compared_with": self.compared_with,
            "files": self.files,
            "bytes": self.num_bytes,
            "problems": self.problems,
        }


def verify(folder: Path, seen: Seen) -> list[Verified]:
    """Read all files of a folder and compare them with their checksums.

    A folder without checksums, such as a model of the Hub or a checkpoint of version 0.1, is read
    too: its headers must fit its files, and its tensors must be readable and finite. Files in the
    Hub's cache carry their SHA-256 in the name of what they link to, and are compared with it. The
    source of a run, if it is still there, is compared with the run's receipt.

    Args:
        folder: A run (all its checkpoints), a checkpoint, a Hugging Face folder, a plan file, or
            the folder of its solved matrices.
        seen: Shows the progress.

    Raises:
        CheckpointError: ``folder`` is none of these.
    """
    if (plan := plan_at(folder)) is not None:
        return [_verified_plan(plan, seen)]
    single = any((folder / name).exists() for name in (FILE, "checkpoint.json", "config.json"))
    targets = [folder] if single else complete(folder)
    if not targets:
        raise CheckpointError(
            f"{folder} is neither a run with checkpoints, nor a checkpoint (no checkpoint.json), "
            "nor a Hugging Face folder (no config.json), nor a plan file or its folder"
        )
    sources = {} if single else _sources_of_run(folder)
    files = [path for target in targets for path in _files(target)]
    plans = [] if single else [path for path in [folder / PLAN_FILE] if path.exists()]
    total = sum(path.stat().st_size for path in [*files, *sources, *plans])
    counter = _Counter(seen, total)
    results = [_verified(target, counter) for target in targets]
    if plans:
        results.append(_verified_plan_of_run(folder, counter))
    return [*results, _verified_source(folder, sources, counter)] if sources else results


def _verified_plan(plan: Path, seen: Seen) -> Verified:
    files = files_of_plan(plan)
    size = sum(path.stat().st_size for path in files)
    problems = list(problems_of_plan(plan, _Counter(seen, size).add))
    return Verified(plan, "plan", "the hashes in it", len(files), size, problems)


def _verified_plan_of_run(run_dir: Path, counter: _Counter) -> Verified:
    plan, problems = run_dir / PLAN_FILE, list(problems_of_runs_plan(run_dir))
    counter.add(size := plan.stat().st_size)
    return Verified(plan, "plan of a run", "the newest checkpoint's copy", 1, size, problems)


def _sources_of_run(run_dir: Path) -> dict[Path, str]:
    """Return the files of a run's source that are still there, with the checksums of its receipt.

    Raises:
        CheckpointError: The receipt is damaged.
    """
    receipt = run_dir / "receipt.json"
    if not receipt.exists():
        return {}
    try:
        recorded = parse_json(receipt.read_text()).get("source_files", [])
        files = {Path(one["path"]): str(one["xxh3_64"]) for one in recorded}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{receipt} is damaged: {error}") from error
    return {path: digest for path, digest in files.items() if path.is_file()}


def _verified_source(run_dir: Path, files: dict[Path, str], counter: _Counter) -> Verified:
    size = sum(path.stat().st_size for path in files)
    result = Verified(
        next(iter(files)).parent, "source of a run", str(run_dir / "receipt.json"), len(files), size
    )
    for path, recorded in files.items():
        _, actual = file_checksum(path, counter.add)
        if actual != recorded:
            result.problems.append(
                f"{path} is not what {run_dir} was made from: it has checksum {actual}, but the "
                f"receipt has {recorded}"
            )
    return result


@dataclass(slots=True)
class _Counter:
    """Bytes read so far."""

    seen: Seen
    total: int
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        self.seen(min(self.done, self.total), self.total)


def _verified(folder: Path, counter: _Counter) -> Verified:
    kind = "checkpoint" if (folder / ".metadata").exists() else "model"
    files = _files(folder)
    result = Verified(folder, kind, FILE, len(files), sum(path.stat().st_size for path in files))
    try:
        checksums = checksums_of(folder) if kind == "checkpoint" else read_checksums(folder)
    except CheckpointError as error:
        result.problems.append(str(error))
        result.compared_with = f"what can be read of {FILE}, which is damaged"
        result.problems += _against_damaged(folder, files, counter)
        return result
    if checksums is not None:
        result.problems += _against(checksums, counter)
        return result
    result.compared_with = "no checksums: headers and sizes only, and that all values are finite"
    checks = _tensors_of_checkpoint if kind == "checkpoint" else _tensors_of_model
    result.problems += _without_checksums(folder, checks, counter)
    return result


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _against(checksums: Checksums, counter: _Counter) -> Iterator[str]:
    """Yield the problems of files that have checksums."""
    for name in checksums.blocks:
        try:
            checksums.check_file(name, seen=counter.add)
        except CheckpointError as error:
            yield str(error)


def _against_damaged(folder: Path, files: list[Path], counter: _Counter) -> Iterator[str]:
    """Yield the problems of files, as far as a damaged ``CHECKSUMS`` shows them."""
    checksums = readable_checksums(folder)
    for problem in _against(checksums, counter):
        yield f"{problem} (or its line in {FILE} is damaged)"
    names = {path.relative_to(folder).as_posix() for path in files} - {FILE}
    if unlisted := sorted(names - checksums.blocks.keys()):
        yield f"{FILE} has no readable line for {', '.join(unlisted)}: not compared with anything"


def _without_checksums(
    folder: Path, checks: Callable[[Path], Iterator[tuple[int, str | None]]], counter: _Counter
) -> Iterator[str]:
    """Yield the problems of a folder that has no checksums."""
    for path in _files(folder):
        if path.is_symlink() and _SHA256.fullmatch(name := path.readlink().name):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != name:
                yield f"{path} is damaged: its SHA-256 is {digest}, but its cache names {name}"
    try:
        for num_bytes, problem in checks(folder):
            counter.add(num_bytes)
            if problem is not None:
                yield problem
    except CheckpointError as error:
        yield str(error)


def _tensors_of_checkpoint(folder: Path) -> Iterator[tuple[int, str | None]]:
    """Yield the bytes of each stored chunk, and its problem if it cannot be read or used."""
    with GlobalTensors(folder) as tensors:
        for key in tensors.names:
            for chunk in tensors.chunks(key, index=None):
                try:
                    values = tensors.load(key, chunk)
                except CheckpointError as error:
                    yield 0, str(error).splitlines()[0]
                    continue
                finite = not values.is_floating_point() or bool(values.isfinite().all())
                yield values.nbytes, None if finite else f"{key} in {folder} is not finite"


def _tensors_of_model(folder: Path) -> Iterator[tuple[int, str | None]]:
    """Yield the bytes of each tensor, and its problem if it cannot be read or used."""
    for name, info in read_headers(folder).items():
        try:
            _check_values(name, info)
        except CheckpointError as error:
            yield info.num_bytes, str(error)
        else:
            yield info.num_bytes, None


def _check_values(name: str, info: TensorInfo) -> None:
    if not info.shape or not info.num_bytes:
        return
    for window in windows(info, [slice(0, info.shape[0])]):
        where = f"rows {window.start} to {window.stop - 1}"
        check_finite(name, info, mapped_rows(info, window), where)
