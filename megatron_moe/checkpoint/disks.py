"""Find out which ranks share a disk, and copy files to ranks that have another one."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.checkpoint.rank_file import CHUNK_BYTES
from megatron_moe.errors import ConfigError
from megatron_moe.hf.disk import naming


@dataclass(frozen=True, slots=True)
class Disks:
    """Ranks by the disk that holds their local folder."""

    ranks: tuple[tuple[int, ...], ...]
    """Ranks of each disk, in order."""

    def of(self, rank: int) -> int:
        """Return the index of a rank's disk."""
        return next(disk for disk, ranks in enumerate(self.ranks) if rank in ranks)

    def neighbor(self, rank: int, shift: int) -> int:
        """Return the rank with the same place on the disk that is ``shift`` further.

        >>> Disks(((0, 1), (2, 3))).neighbor(1, 1)
        3
        """
        disk = self.of(rank)
        return self.ranks[(disk + shift) % len(self.ranks)][self.ranks[disk].index(rank)]

    def leads(self, rank: int) -> bool:
        """Return whether this is the first rank of its disk."""
        return self.ranks[self.of(rank)][0] == rank


def find_disks(folder: Path, group: dist.ProcessGroup) -> Disks:
    """Return which ranks share ``folder``: they read the same number from a file in it.

    Raises:
        ConfigError: Disks have different numbers of ranks.
    """
    own = _number_of(folder)
    numbers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(numbers, own, group=group)
    ranks: dict[str, list[int]] = {}
    for rank, number in enumerate(numbers):
        ranks.setdefault(number, []).append(rank)
    if len({len(of_disk) for of_disk in ranks.values()}) > 1:
        raise ConfigError(
            f"checkpoint.local_dir ({folder}) must be used by equally many ranks on each node, "
            "because each rank copies its file to one rank of the next node, but is used by "
            f"{', '.join(str(len(of_disk)) for of_disk in ranks.values())} ranks.\n"
            "  start as many ranks on each node, or leave checkpoint.local_dir unset"
        )
    return Disks(tuple(map(tuple, ranks.values())))


def _number_of(folder: Path) -> str:
    """Return the random number of a folder, which the first rank that comes draws."""
    path = folder / "disk.id"
    if path.exists():  # an earlier job's; the disk may be full by now
        return path.read_text()
    own = path.with_name(f".disk.id-{secrets.token_hex(8)}")
    try:
        with naming(own):
            own.write_text(secrets.token_hex(8))
        os.link(own, path)  # fails if there is one, and is never half written
    except FileExistsError:
        pass
    finally:
        own.unlink(missing_ok=True)
    return path.read_text()


def exchange(
    send: Path | None, to: int, receive: Path | None, sender: int, group: dist.ProcessGroup
) -> None:
    """Send a file to one rank and receive one from another, at the same time.

    Both sides of each transfer must call it. Everything is received even if it cannot be written.

    Args:
        send: File to send; None sends nothing.
        to: Rank that receives it.
        receive: Path of the file to write; None receives nothing.
        sender: Rank that it comes from.
        group: Group of the transfers, which runs on the host.

    Raises:
        OSError: A file cannot be read or written.
    """
    own, theirs = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    if send is not None:
        own[0] = send.stat().st_size
    requests = [dist.isend(own, to, group=group)] if send is not None else []
    if receive is not None:
        dist.recv(theirs, sender, group=group)
    for request in requests:
        _wait(request)
    with _Source(send) as source, _Target(receive) as target:
        for start in range(0, max(int(own), int(theirs)), CHUNK_BYTES):
            request = None
            if start < int(own):
                request = dist.isend(source.next(int(own) - start), to, group=group)
            if start < int(theirs):
                size = min(CHUNK_BYTES, int(theirs) - start)
                chunk = torch.empty(size, dtype=torch.uint8)
                dist.recv(chunk, sender, group=group)
                target.add(chunk)
            _wait(request)


def _wait(request: dist.Work | None) -> None:
    if request is not None:
        request.wait()


class _Source:
    """A file that is sent, as chunks."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("rb")

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def next(self, left: int) -> torch.Tensor:
        assert self._file is not None
        chunk = torch.empty(min(CHUNK_BYTES, left), dtype=torch.uint8)
        self._file.readinto(chunk.numpy().data)
        return chunk


class _Target:
    """A file that is received; an error of its disk is raised at the end."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._error = path, None

    def __enter__(self) -> _Target:
        try:
            self._file = None if self._path is None else self._path.open("wb")
        except OSError as error:
            self._file, self._error = None, error
        return self

    def add(self, chunk: torch.Tensor) -> None:
        if self._file is not None and self._error is None:
            try:
                self._file.write(chunk.numpy().data)
            except OSError as error:
                self._error = error

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                self._error = self._error or error
            self._file.close()
        if self._error is not None and kind is None:
            raise self._error
