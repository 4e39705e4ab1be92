"""Tokenize text files into one token file, on all cores, in the order of the input.

The reader sends blocks of 1 MiB to worker processes and collects their ids in order. The result
does not depend on the number of workers, and only a few blocks are in memory at a time. The result
does depend on `Rules` and on the inputs: a killed run resumes from its last commit if these are
unchanged.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType

from megatron_moe.data.documents import Block, ReadPosition, read_blocks
from megatron_moe.data.encode import Counts, Encoded, Rules, encode_block
from megatron_moe.data.files import find_files, left_out
from megatron_moe.data.progress import ByteProgress
from megatron_moe.data.tokenizer import Tokenizer
from megatron_moe.data.writer import TokenWriter
from megatron_moe.errors import DataError
from megatron_moe.hf.disk import write_text

TAKE_ALL = Rules()

_COMMIT_SECONDS = 5.0
_BLOCKS_AHEAD = 3
_DIGEST_BYTES = 16
_SHOWN = 20


def do_nothing() -> None:
    """Ignore progress."""


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """Summary of a tokenized corpus; also written to ``prefix.json``."""

    counts: Counts

    malformed: list[str]
    """``file:line: reason`` for the first malformed records."""

    left_out: list[str]
    """First files in the folders of the input that are not read, because of their names."""

    seconds: float
    """Run time of the process that finished the file, without earlier processes it resumed."""

    tokens_per_second: float
    """Speed of that process alone."""


def tokenize_files(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    rules: Rules = TAKE_ALL,
    workers: int = 1,
    max_malformed: int = 0,
    on_progress: Callable[[], None] = do_nothing,
) -> CorpusReport:
    """Write the token file ``prefix.bin``, ``prefix.idx`` from ``inputs``.

    Args:
        inputs: Files in the formats of `documents.py`, and folders of such files.
        prefix: Pair to write; it appears only when it is complete.
        tokenizer: Tokenizer; each document ends with its end-of-text id.
        rules: Filters for documents.
        workers: Number of tokenizing processes. 1 uses this process and the tokenizer's threads.
        max_malformed: Maximum number of malformed records to skip and count.
        on_progress: Called after every block.

    Returns:
        Counts and speed.

    Raises:
        DataError: No input, damaged input, more malformed records than ``max_malformed``, no text
            at all, or a token file at ``prefix`` already.
    """
    if Path(f"{prefix}.idx").exists():
        raise DataError(f"{prefix}.idx already exists; delete the pair to tokenize again")
    if rules.add_bos and tokenizer.bos_id is None:
        raise DataError(
            "data.add_bos (true) needs a tokenizer with a bos_token, and this one has none.\n"
            "  set data.add_bos=false, or bos_token in tokenizer_config.json"
        )
    files = find_files(inputs)
    writer = TokenWriter(
        prefix,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
        identity=_identity(files, tokenizer, rules),
    )
    job = _Job(writer, tokenizer, rules, max_malformed=max_malformed)
    try:
        report = job.run(files, workers, on_progress)
        report = replace(report, left_out=[str(file) for file in left_out(inputs)[:_SHOWN]])
    finally:
        writer.close()
    writer.finish()
    write_text(Path(f"{prefix}.json"), json.dumps(asdict(report), indent=2) + "\n")
    return report


class _Job:
    """State of one run: position, counts, and the digests of the documents seen so far."""

    def __init__(
        self, writer: TokenWriter, tokenizer: Tokenizer, rules: Rules, *, max_malformed: int
    ) -> None:
        journal = writer.journal or {"place": {}, "counts": {}, "malformed": []}
        self.position = ReadPosition(**journal["place"])
        self.counts = Counts(**journal["counts"])
        self.malformed: list[str] = journal["malformed"]
        self._writer, self._tokenizer, self._rules = writer, tokenizer, rules
        self._max_malformed = max_malformed
        self._seen = writer.digests(_DIGEST_BYTES)

    def run(self, files: list[Path], workers: int, on_progress: Callable[[], None]) -> CorpusReport:
        starts = [0, *accumulate(path.stat().st_size for path in files)]
        title = f"tokenize {files[0].name}" + (f" and {len(files) - 1} more" if files[1:] else "")
        started, tokens_before, committed = time.monotonic(), self.counts.tokens, time.monotonic()
        blocks = read_blocks(files, text_key=self._rules.text_key, start=self.position)
        with ByteProgress(title, total_bytes=starts[-1]) as progress:
            for block, encoded in _encoded(blocks, self._tokenizer, self._rules, workers):
                self._take(encoded)
                on_progress()
                self.position = block.after
                progress.advance_to(starts[self.position.file] + self.position.read_bytes)
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
        if not self.counts.documents:
            raise DataError(
                f"{', '.join(map(str, files[:3]))} contains no text: {self.counts.left_out()}"
            )
        seconds = time.monotonic() - started
        speed = (self.counts.tokens - tokens_before) / seconds
        return CorpusReport(self.counts, self.malformed, [], seconds, speed)

    def _take(self, encoded: Encoded) -> None:
        """Write the new documents of a block, and count them."""
        self.counts.add(encoded.counts)
        self.malformed = (self.malformed + encoded.malformed)[:_SHOWN]
        if self.counts.malformed > self._max_malformed:
            self._refuse_malformed()
        encoded = self._without_duplicates(encoded)
        self._writer.append(encoded.ids_T, encoded.lengths_Q)
        if encoded.ends_document:
            self._writer.end_documents(len(encoded.lengths_Q))
            self.counts.documents += len(encoded.lengths_Q)
        self.counts.tokens += len(encoded.ids_T)
        self.counts.characters += sum(encoded.characters_Q)

    def _without_duplicates(self, encoded: Encoded) -> Encoded:
        kept = []
        for i, digest in enumerate(encoded.digests_Q):
            if digest not in self._seen:
                self._seen.add(digest)
                self._writer.add_digest(digest)
                kept.append(i)
        self.counts.duplicates += len(encoded.digests_Q) - len(kept)
        return encoded.only(kept) if encoded.digests_Q else encoded

    def _refuse_malformed(self) -> None:
        raise DataError(
            f"{self.counts.malformed} malformed documents, more than the {self._max_malformed} "
            "that may be skipped:\n" + "\n".join(f"  {line}" for line in self.malformed)
        )

    def _commit(self) -> None:
        self._writer.commit(
            {
                "place": asdict(self.position),
                "counts": asdict(self.counts),
                "malformed": self.malformed,
            }
        )


def _identity(files: list[Path], tokenizer: Tokenizer, rules: Rules) -> dict[str, Any]:
    """Return everything that the token file depends on."""
    return {
        "files": [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files
        ],
        "tokenizer": tokenizer.fingerprint,
        "rules": asdict(rules),
    }


def _encoded(
    blocks: Iterable[Block], tokenizer: Tokenizer, rules: Rules, workers: int
) -> Iterator[tuple[Block, Encoded]]:
    """Yield each block with its ids, in order, holding at most a few blocks per worker."""
    if workers == 1:
        yield from ((block, encode_block(block, tokenizer, rules)) for block in blocks)
        return
    # Forked workers inherit the tokenizer; spawned ones would import everything again. Freezing
    # keeps the inherited memory shared, which their garbage collector would otherwise write to.
    gc.freeze()
    with (
        _explained(),
        ProcessPoolExecutor(
            workers, mp_context=get_context("fork"), initializer=_start, initargs=(tokenizer, rules)
        ) as pool,
    ):
        waiting: deque[tuple[Block, Future[Encoded]]] = deque()
        for block in blocks:
            waiting.append((block, pool.submit(_work, block)))
            if len(waiting) >= workers * _BLOCKS_AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise `DataError` if a worker dies."""
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process was killed, by a user or by the out-of-memory killer.\n"
            "  run the same command to resume, with fewer --workers if memory is short"
        ) from error


_worker: dict[str, Any] = {}


def _start(tokenizer: Tokenizer, rules: Rules) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads would compete with other workers
    _worker.update(tokenizer=tokenizer, rules=rules)


def _work(block: Block) -> Encoded:
    return encode_block(block, _worker["tokenizer"], _worker["rules"])
