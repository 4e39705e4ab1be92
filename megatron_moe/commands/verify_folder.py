"""Verify a checkpoint or a model: compare its files with their checksums, if it has any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_moe.checkpoint.folder import checksums_of
from megatron_moe.commands.verify_listing import Listing, in_words, without_checksum
from megatron_moe.commands.verify_place import is_checkpoint
from megatron_moe.commands.verify_result import VALUES_ONLY, Counter, Verified, size_of
from megatron_moe.commands.verify_values import check_values, is_older_export, lost_checksums
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import FILE, Checksums, read_checksums, readable_checksums


def verified_folder(listing: Listing, counter: Counter) -> Verified:
    """Return the result for the folder of a listing, after reading its files."""
    folder = listing.folder
    kind = "checkpoint" if is_checkpoint(folder) else "model"
    result = Verified(folder, kind, FILE, problems=list(listing.problems))
    try:
        checksums = checksums_of(folder) if kind == "checkpoint" else read_checksums(folder)
    except CheckpointError as error:
        result.problems.append(str(error))
        if (folder / FILE).exists():
            _against_damaged(result, listing, counter)
        else:
            _without_checksums(result, listing, counter)
        return _unless_removed(result)
    if checksums is None:
        if kind == "model" and (lost := lost_checksums(listing)) is not None:
            result.problems.append(lost)
        _without_checksums(result, listing, counter)
    else:
        _against(result, listing, checksums, counter)
    return _unless_removed(result)


def _unless_removed(result: Verified) -> Verified:
    """Return the result; problems of a folder that is gone now are only that it was removed."""
    if not result.folder.exists():
        result.problems = []
        result.notes = [
            f"{result.folder} was removed while it was read: a running job keeps only its newest "
            "checkpoints (checkpoint.keep)"
        ]
    return result


def _count(result: Verified, names: Iterable[str]) -> None:
    """Add the files with these names to those that were checked."""
    sizes = [size for name in names if (size := size_of(result.folder / name)) is not None]
    result.files, result.num_bytes = len(sizes), sum(sizes)


def _against(result: Verified, listing: Listing, checksums: Checksums, counter: Counter) -> None:
    """Add the problems of a folder that has checksums."""
    result.problems += _problems(checksums, counter)
    _count(result, checksums.blocks)
    visible, hidden = without_checksum(listing, checksums.blocks.keys())
    if visible:
        result.problems.append(
            f"{result.folder} has files that are not listed in {FILE}, so that nothing tells "
            f"whether they belong there: {in_words(visible)}.\n  move them out of the folder"
        )
    if hidden:
        result.notes.append(f"hidden and not listed in {FILE}: {in_words(hidden)}")


def _problems(checksums: Checksums, counter: Counter) -> Iterator[str]:
    for name in checksums.blocks:
        try:
            checksums.check_file(name, seen=counter.add)
        except CheckpointError as error:
            yield str(error)


def _against_damaged(result: Verified, listing: Listing, counter: Counter) -> None:
    """Add the problems of files, as far as a damaged ``CHECKSUMS`` shows them."""
    result.compared_with = f"what can be read of {FILE}, which is damaged"
    checksums = readable_checksums(result.folder)
    for problem in _problems(checksums, counter):
        result.problems.append(f"{problem} (or its line in {FILE} is damaged)")
    _count(result, checksums.blocks)
    visible, hidden = without_checksum(listing, checksums.blocks.keys())
    if visible or hidden:
        result.problems.append(
            f"{FILE} has no readable line for {in_words([*visible, *hidden])}: not compared with "
            "anything"
        )


def _without_checksums(result: Verified, listing: Listing, counter: Counter) -> None:
    """Add the problems of a folder that has no checksums."""
    result.compared_with = VALUES_ONLY
    is_checkpoint = result.kind == "checkpoint"
    checked = check_values(listing, is_checkpoint=is_checkpoint, seen=counter.add)
    result.problems += checked.problems
    if not is_checkpoint and "config.json" not in listing.names:
        path = result.folder / "config.json"
        result.problems.append(f"{path} is missing: without it, no program can load the weights")
    _count(result, checked.names)
    unchecked = [name for name in listing.names if name not in checked.names]
    if unchecked:
        result.notes.append(f"not checked, for lack of checksums: {in_words(unchecked)}")
    if not is_checkpoint and not result.problems and is_older_export(result.folder):
        result.notes.append(
            f"this export has no {FILE}. An earlier version wrote it, with or without that file: "
            "its weights do not say which. Export the run again to get one"
        )
