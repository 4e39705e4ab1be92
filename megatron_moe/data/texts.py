"""The run's texts, opened on every rank: tokenized once by rank 0, read by all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_moe.config.run import RunConfig
from megatron_moe.data.samples import Samples
from megatron_moe.data.stream import TokenStream
from megatron_moe.data.tokens import prepare_tokens
from megatron_moe.errors import UserError


@dataclass(frozen=True, slots=True)
class Texts:
    """What the run trains on and what it is judged on."""

    training: Samples
    validation: Samples | None


def open_texts(config: RunConfig, *, vocab_size: int) -> Texts:
    """Tokenize what is not tokenized yet and open it.

    Raises:
        DataError: A text that cannot be used; on every rank, whichever found it.
    """
    validation = config.data.validation_path
    return Texts(
        training=_open(config.data.path, config, vocab_size),
        validation=None if validation is None else _open(validation, config, vocab_size),
    )


def _open(path: Path, config: RunConfig, vocab_size: int) -> Samples:
    outcome: list[Path | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = prepare_tokens(
                path,
                dense_folder=config.dense.path,
                vocab_size=vocab_size,
                cache_dir=config.run.dir / "tokens",
            )
        except UserError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    prefix = outcome[0]
    if isinstance(prefix, UserError):
        raise prefix
    assert prefix is not None
    stream = TokenStream(prefix, vocab_size=vocab_size)
    return Samples(stream, seq_length=config.data.seq_length, seed=config.run.seed)
