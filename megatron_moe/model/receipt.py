"""Receipt of an upcycling: bytes read, time and memory of each rank, and the verification.

It also holds the checksum of each file of the source, of all its bytes. Ranks read slices, so they
read the files once more for it: each file by one rank, mostly from the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.config.parts import Frozen
from megatron_moe.config.train import Lora
from megatron_moe.hf.checksums import file_checksum
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.header import INDEX_FILE
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.hf.source_files import source_files
from megatron_moe.model.upcycle import Filled
from megatron_moe.model.verify import Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReceipt:
    """Cost of upcycling on one rank."""

    rank: int
    parameters: int
    parameter_bytes: int
    bytes_read: int
    held_bytes_before: int
    """Memory in use before the model was built."""
    peak_bytes: int
    """Peak memory from then until every parameter was filled."""
    seconds: float


def rank_receipt(
    filled: Filled, *, held_bytes_before: int, peak_bytes: int, seconds: float
) -> RankReceipt:
    """Build the receipt of this rank."""
    return RankReceipt(
        rank=dist.get_rank(),
        parameters=filled.parameters,
        parameter_bytes=filled.parameter_bytes,
        bytes_read=filled.bytes_read,
        held_bytes_before=held_bytes_before,
        peak_bytes=peak_bytes,
        seconds=round(seconds, 3),
    )


def gather_receipt(
    own: RankReceipt,
    *,
    tensors_used: int,
    source_bytes: int,
    plan_hash: str,
    method: str,
    frozen: Frozen,
    lora: Lora,
    agreement: Agreement | None,
    against_dense: dict[str, Any] | None,
    source_files: list[dict[str, Any]],
    construction: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the receipt of the whole run on every rank, in the format of receipt.json.

    ``construction`` is what the plan file says: the text it was measured on, and each layer's fit.
    """
    ranks: list[RankReceipt] = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {
        "method": method,
        "plan_hash": plan_hash,
        "frozen": sorted(frozen.names()),
        "lora": lora.model_dump() if lora.rank else None,
        "tensors_covered": tensors_used,
        "source_bytes": source_bytes,
        "source_files": source_files,
        "bytes_read": sum(rank.bytes_read for rank in ranks),
        "seconds": max(rank.seconds for rank in ranks),
        "verification": None if agreement is None else asdict(agreement),
        "against_dense": against_dense,
        "construction": construction,
        "ranks": [asdict(rank) for rank in ranks],
    }


def checksums_of_sources(sources: Sequence[SourceCheckpoint]) -> list[dict[str, Any]]:
    """Return path, bytes and XXH3 of all files with weights, and of those that exports copy.

    All ranks must call it; each reads its share of the files.
    """
    paths = sorted(path for source in sources for path in _files_of(source))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = {str(path): file_checksum(path) for path in paths[rank::world_size]}
    of_ranks: list[dict[str, tuple[int, str]]] = [own] * world_size
    dist.all_gather_object(of_ranks, own)
    return [
        {"path": path, "bytes": size, "xxh3_64": digest}
        for path, (size, digest) in sorted(item for one in of_ranks for item in one.items())
    ]


def _files_of(source: SourceCheckpoint) -> set[Path]:
    folder = source.folder.resolve()
    files = {folder / info.file.name for info in source.tensors.values()}
    files |= set(folder.glob("*.distcp"))
    index = folder / INDEX_FILE
    return files | set(source_files(folder)) | ({index} if index.is_file() else set())


def write_receipt(receipt: dict[str, Any], run_dir: Path) -> None:
    """Write receipt.json atomically."""
    write_text(run_dir / "receipt.json", json.dumps(receipt, indent=2) + "\n")
