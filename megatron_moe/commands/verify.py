"""Verify a checkpoint, a model or a plan: read every byte once and report what is damaged."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.checkpoint.folder import checkpoint_folders, newest
from megatron_moe.commands.verify_folder import verified_folder
from megatron_moe.commands.verify_latest import problem_of_latest, remark_on_latest
from megatron_moe.commands.verify_listing import in_words, list_folder, refuse_irregular
from megatron_moe.commands.verify_place import check_place, is_one_folder, is_run, why_unverifiable
from megatron_moe.commands.verify_plan import (
    files_of_plan,
    plan_at,
    problems_of_plan,
    problems_of_runs_plan,
    unlisted_of_plan,
)
from megatron_moe.commands.verify_result import Counter, Seen, Verified, size_of
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import PLAN_FILE
from megatron_moe.experts.solved import solved_folder
from megatron_moe.hf.checksums import file_checksum
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import regular


def verify(path: Path, seen: Seen) -> list[Verified]:
    """Read all files of a folder and compare them with their checksums.

    A folder without checksums, such as a model of the Hub or a checkpoint of version 0.1, is read
    too: its headers must fit its files, and its tensors must be readable and finite. Files in the
    Hub's cache carry their SHA-256 in the name of what they link to, and are compared with it. The
    source of a run, if it is still there, is compared with the run's receipt.

    Args:
        path: A run (all its checkpoints), a checkpoint, a Hugging Face folder, a plan file, or
            the folder of its solved matrices.
        seen: Shows the progress.

    Raises:
        CheckpointError: ``path`` is none of these, or holds a pipe, a socket or a device, which
            may never end.
    """
    check_place(path)
    single = path.is_dir() and is_one_folder(path)
    if not single and not is_run(path):
        if (plan := plan_at(path)) is None:
            raise CheckpointError(why_unverifiable(path))
        return [_verified_plan(plan, seen)]
    listings = [list_folder(folder) for folder in ([path] if single else _checkpoints(path))]
    refuse_irregular(listings)
    sources = {} if single else _sources_of_run(path)
    plans = [] if single else [file for file in [path / PLAN_FILE] if file.exists()]
    files = [listing.folder / name for listing in listings for name in listing.names]
    counter = Counter(seen, sum(size_of(file) or 0 for file in [*files, *sources, *plans]))
    results = [] if single else [_verified_latest(path)]
    results += [verified_folder(listing, counter) for listing in listings]
    if plans:
        results.append(_verified_plan_of_run(path, counter))
    return [*results, _verified_source(path, sources, counter)] if sources else results


def _checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, and the folder that a resume reads if it is none of them."""
    folders = checkpoint_folders(run_dir)
    if problem_of_latest(run_dir) is None and (start := newest(run_dir)) is not None:
        folders += [start] if start not in folders else []
    return folders


def _verified_latest(run_dir: Path) -> Verified:
    pointer = run_dir / "checkpoints" / "latest"
    result = Verified(pointer, "latest of a run", "the checkpoints next to it")
    result.files, result.num_bytes = int(pointer.is_file()), size_of(pointer) or 0
    if (problem := problem_of_latest(run_dir)) is not None:
        result.problems.append(problem)
    elif (remark := remark_on_latest(run_dir)) is not None:
        result.notes.append(remark)
    return result


def _verified_plan(plan: Path, seen: Seen) -> Verified:
    files = files_of_plan(plan)
    size = sum(path.stat().st_size for path in files)
    result = Verified(plan, "plan", "the hashes in it", len(files), size)
    result.problems += problems_of_plan(plan, Counter(seen, size).add)
    if others := unlisted_of_plan(plan):
        where = solved_folder(plan)
        result.notes.append(f"in {where}, but not a part of this plan: {in_words(others)}")
    return result


def _verified_plan_of_run(run_dir: Path, counter: Counter) -> Verified:
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
        recorded = parse_json(regular(receipt).read_text()).get("source_files", [])
        files = {Path(one["path"]): str(one["xxh3_64"]) for one in recorded}
    except OSError as error:
        raise CheckpointError(f"cannot read {receipt}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{receipt} is damaged: {error}") from error
    return {path: digest for path, digest in files.items() if size_of(path) is not None}


def _verified_source(run_dir: Path, files: dict[Path, str], counter: Counter) -> Verified:
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
