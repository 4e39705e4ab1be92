"""Settings of the training and held-out text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.values import (
    Count,
    HomePath,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
)


class Domain(Section):
    """One named domain of a data mixture."""

    path: HomePath
    """The domain's text, in the formats of data.path."""

    weight: NonNegative | None = None
    """Fraction of the samples if data.mixing.weights is given. The weights of all domains sum to
    1."""

    validation_path: HomePath | None = None
    """The domain's held-out text. Alternatively, set data.validation_fraction for all domains."""


class Mixing(Section):
    """Domain weights of the data mixture, and how they adapt."""

    weights: Literal["given", "llama", "sheared"] = "given"
    """Initial domain weights. given: data.domains.*.weight. llama, sheared: the published weights
    for the seven domains of SlimPajama (LLaMA-MoE, arXiv 2406.16554): commoncrawl, c4, github,
    wikipedia, books, arxiv, stackexchange."""

    update: Literal["never", "sheared_llama", "doremi"] = "never"
    """never: keep the weights. sheared_llama: increase the weights of domains whose held-out loss
    is above the reference and decrease the others (arXiv 2310.06694, algorithm 1). doremi: the same
    without clamping the excess loss at zero."""

    interval: Count = 100_000_000
    """Number of tokens between weight updates; at least those of one step. LLaMA-MoE uses 5e9."""

    reference_losses: HomePath | None = None
    """File written by `megatron-moe reference-loss`, or a JSON object {domain: nats per token}."""

    step_size: Positive = 1.0
    """Factor on the excess loss: a domain one nat above its reference gains a factor
    exp(step_size)."""

    floor: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Fraction of the weight that is spread evenly at every update, so that no domain
    disappears."""


class Data(Section):
    """Training and held-out text."""

    path: HomePath | None = None
    """A text or JSONL file, a folder of such files, or the prefix of a Megatron .bin/.idx pair."""

    domains: dict[str, Domain] | None = None
    """Several named texts with weights, instead of path."""

    mixing: Mixing = Mixing()
    """Weights of the domains."""

    kind: Literal["text", "chat"] = "text"
    """text: compute the loss on every token. chat: conversations (messages or ShareGPT, one per
    line) in the tokenizer's chat template, packed without being split; the loss covers only what
    assistants say."""

    seq_length: Count = 2048
    """Number of tokens per training sequence."""

    reset_attention: bool = False
    """Prevent tokens from attending to earlier documents or conversations in the same sequence."""

    validation_path: HomePath | None = None
    """Held-out text, in the formats of path. Its loss is logged before the first step and at every
    checkpoint."""

    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this fraction of each text instead: its last documents, without splitting any."""

    validation_samples: Count = 64
    """Number of sequences of each held-out text to evaluate, counted from its beginning."""

    text_key: str = "text"
    """Key of JSON lines, or column of tables, that holds the text. Requires kind text."""

    add_bos: bool = False
    """Begin each document with the tokenizer's begin-of-text token, as Llama was trained. Documents
    always end with the end-of-text token. Requires kind text; a chat template adds its own."""

    max_malformed: NonNegativeInt = 0
    """Number of malformed lines or conversations per text to skip, count and show before the run
    fails."""

    warn_above_epochs: Positive = 4.0
    """Warn before the run about domains that will be repeated more often than this. Up to about
    four epochs are nearly as good as new text (arXiv 2305.16264)."""
