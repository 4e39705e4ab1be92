"""Open the texts of a run on every rank; rank 0 tokenizes them once.

A run with ``data.path`` is a mixture of one domain, so that a single code path serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.config.data import Domain
from megatron_moe.config.mixtures import SINGLE
from megatron_moe.config.run import RunConfig
from megatron_moe.data.chat_samples import ChatSamples, split_conversations
from megatron_moe.data.corpus import do_nothing
from megatron_moe.data.encode import Rules
from megatron_moe.data.reference import read_reference_losses
from megatron_moe.data.samples import Sample, Samples, Text
from megatron_moe.data.stream import TokenStream, fingerprint, split_documents
from megatron_moe.data.tokenizer import fingerprint_of
from megatron_moe.data.tokens import prepare_conversations, prepare_tokens
from megatron_moe.errors import UserError
from megatron_moe.json_text import parse_json


@dataclass(frozen=True, slots=True)
class Texts:
    """Training and validation text of a run, by domain."""

    training: dict[str, Text]

    validation: dict[str, Text]
    """Held-out text of the domains that have one."""

    references: dict[str, float] | None
    """Reference losses of an adaptive mixture, in nats per token."""

    remarks: list[str]
    """Notes for the log about skipped text."""

    prefixes: dict[str, Path] = field(default_factory=dict)
    """Token file of each domain that is trained on."""

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each domain's tokens."""
        return {name: fingerprint(prefix) for name, prefix in self.prefixes.items()}

    def first_sample(self) -> Sample:
        """Return the first held-out sample, or the first training sample if none is held out."""
        return next(iter((self.validation or self.training).values())).chunk(0)


def open_texts(
    config: RunConfig, *, vocab_size: int, on_progress: Callable[[], None] = do_nothing
) -> Texts:
    """Tokenize the texts that are not tokenized yet, and open all of them.

    Args:
        config: The run.
        vocab_size: Rows of the model's embedding.
        on_progress: Called on rank 0 while it tokenizes, which can take hours.

    Raises:
        DataError: A text cannot be used. Raised on every rank, also if only one rank finds it.
    """
    single = Domain.model_construct(
        path=config.data.path, weight=None, validation_path=config.data.validation_path
    )
    opened = {
        name: _open_domain(config, domain, vocab_size, on_progress)
        for name, domain in (config.data.domains or {SINGLE: single}).items()
    }
    references = config.data.mixing.reference_losses
    return Texts(
        training={name: training for name, (training, _, _, _) in opened.items()},
        validation={name: held_out for name, (_, held_out, _, _) in opened.items() if held_out},
        references=None
        if references is None
        else read_reference_losses(
            references, tuple(opened), tokenizer=fingerprint_of(config.source.path)
        ),
        remarks=[f"{name}: {line}" for name, (_, _, lines, _) in opened.items() for line in lines],
        prefixes={name: prefix for name, (_, _, _, prefix) in opened.items()},
    )


def open_text(path: Path, config: RunConfig, *, vocab_size: int) -> Text:
    """Open one whole text that is not a domain of the run, in any format of ``data.path``.

    Raises:
        DataError: The text cannot be used. Raised on every rank.
    """
    open_ = _open_chat if config.data.kind == "chat" else _open_text
    (text,) = open_(_prepared(path, config, vocab_size), config, vocab_size, split=False)
    return text


def _open_domain(
    config: RunConfig, domain: Domain, vocab_size: int, on_progress: Callable[[], None]
) -> tuple[Text, Text | None, list[str], Path]:
    """Return training text, held-out text, remarks, and the token file of the training text."""
    open_ = _open_chat if config.data.kind == "chat" else _open_text
    prefix = _prepared(domain.path, config, vocab_size, on_progress)
    remarks = _left_out(prefix)
    if config.data.validation_fraction is not None:
        training, validation = open_(prefix, config, vocab_size, split=True)
    else:
        (training,), validation = open_(prefix, config, vocab_size, split=False), None
        if domain.validation_path is not None:
            other = _prepared(domain.validation_path, config, vocab_size, on_progress)
            (validation,) = open_(other, config, vocab_size, split=False)
            remarks += _left_out(other)
    for text in (training, validation):
        if isinstance(text, ChatSamples) and text.too_long:
            remarks.append(
                f"{len(text.too_long)} conversations are longer than data.seq_length + 1 = "
                f"{config.data.seq_length + 1} tokens and are skipped; the first is number "
                f"{text.too_long[0]} (counted from 0, without malformed ones)"
            )
    return training, validation, remarks, prefix


def _open_text(prefix: Path, config: RunConfig, vocab_size: int, *, split: bool) -> list[Text]:
    fraction = config.data.validation_fraction
    if split and fraction is not None:
        streams = split_documents(prefix, vocab_size=vocab_size, validation_fraction=fraction)
    else:
        streams = (TokenStream(prefix, vocab_size=vocab_size),)
    return [
        Samples(
            stream,
            seq_length=config.data.seq_length,
            seed=config.run.seed,
            reset_positions=config.data.reset_attention,
        )
        for stream in streams
    ]


def _open_chat(prefix: Path, config: RunConfig, vocab_size: int, *, split: bool) -> list[Text]:
    fraction = config.data.validation_fraction
    if split and fraction is not None:
        parts = split_conversations(prefix, validation_fraction=fraction)
    else:
        parts = (slice(None),)
    return [
        ChatSamples(
            prefix,
            seq_length=config.data.seq_length,
            vocab_size=vocab_size,
            seed=config.run.seed,
            conversations=part,
        )
        for part in parts
    ]


def _prepared(
    path: Path,
    config: RunConfig,
    vocab_size: int,
    on_progress: Callable[[], None] = do_nothing,
) -> Path:
    data = config.data
    common: dict[str, Any] = {
        "dense_folder": config.source.path,
        "vocab_size": vocab_size,
        "cache_dir": config.run.dir / "tokens",
        "max_malformed": data.max_malformed,
        "on_progress": on_progress,
    }
    if data.kind == "chat":
        return _once(lambda: prepare_conversations(path, **common))
    rules = Rules(text_key=data.text_key, add_bos=data.add_bos)
    return _once(lambda: prepare_tokens(path, **common, rules=rules))


def _once(work: Callable[[], Path]) -> Path:
    """Run ``work`` on rank 0, and return its result or raise its error on every rank."""
    outcome: list[Path | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    assert outcome[0] is not None
    return outcome[0]


def _left_out(prefix: Path) -> list[str]:
    """Return remarks on text that was left out, from the report written when tokenizing."""
    report = Path(f"{prefix}.json")
    if not report.exists():
        return []
    written = parse_json(report.read_text(encoding="utf-8"))
    malformed = [f"skipped as malformed: {line}" for line in written.get("malformed", [])]
    names = [f"not read because of its name: {file}" for file in written.get("left_out", [])]
    return malformed + names
