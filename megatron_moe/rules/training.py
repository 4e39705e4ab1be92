"""Rules of text, mixtures and the schedule."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.mixtures import starting_weights
from megatron_moe.errors import ConfigError
from megatron_moe.rules.case import Case


def schedule(case: Case) -> Iterator[str]:
    """Check that the learning rate reaches its peak and decays."""
    optimizer, steps = case.config.optimizer, case.config.train.steps
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr ({optimizer.min_lr}) must be at most optimizer.lr ({optimizer.lr}): "
            "the schedule decays from lr to min_lr.\n"
            f"  largest optimizer.min_lr: {optimizer.lr}"
        )
    if steps and optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) must be less than train.steps "
            f"({steps}): otherwise the learning rate never reaches its peak.\n"
            f"  largest optimizer.warmup_steps: {steps - 1}"
        )


def texts(case: Case) -> Iterator[str]:
    """Check that there is one text or a mixture, and at most one kind of held-out text."""
    data = case.config.data
    if (data.path is None) == (data.domains is None):
        yield (
            "exactly one of data.path and data.domains must be set.\n"
            "  set data.path for one text, or data.domains for several named texts with weights"
        )
        return
    for name, default in (("text_key", "text"), ("add_bos", False)):
        if data.kind == "chat" and (value := getattr(data, name)) != default:
            yield (
                f"data.{name} ({value}) requires data.kind text: the chat template decides what a "
                f"conversation's text is.\n  remove data.{name}"
            )
    if data.domains is not None and data.validation_path is not None:
        yield (
            "data.validation_path requires data.path.\n"
            "  set data.domains.NAME.validation_path, or data.validation_fraction"
        )
    paths = [data.validation_path, *(d.validation_path for d in (data.domains or {}).values())]
    if data.validation_fraction is not None and any(paths):
        yield (
            f"data.validation_fraction ({data.validation_fraction}) and a validation_path are two "
            "ways to hold out text.\n  set only one of them"
        )


def mixing(case: Case) -> Iterator[str]:
    """Check that adaptive weights have reference losses, held-out text and a valid interval."""
    data, train = case.config.data, case.config.train
    try:
        starting_weights(data)
    except ConfigError as error:
        yield str(error)
    mixing, step_tokens = data.mixing, train.global_batch_size * data.seq_length
    if mixing.update == "never":
        return
    rule = f"data.mixing.update ({mixing.update})"
    if data.domains is None:
        yield f"{rule} needs data.domains: one text has no weights to adapt"
        return
    if mixing.reference_losses is None:
        yield (
            f"{rule} needs data.mixing.reference_losses: weights follow the losses in excess of "
            "them.\n"
            "  run megatron-moe reference-loss CONFIG.yaml --out FILE"
        )
    paths = [domain.validation_path for domain in data.domains.values()]
    if data.validation_fraction is None and not all(paths):
        yield (
            f"{rule} needs held-out text of each domain.\n"
            "  set data.validation_fraction, or data.domains.NAME.validation_path for all"
        )
    if mixing.interval < step_tokens:
        yield (
            f"data.mixing.interval ({mixing.interval} tokens) must be at least the tokens of a "
            f"step, train.global_batch_size * data.seq_length = {step_tokens}: weights "
            f"change only between steps.\n  smallest data.mixing.interval: {step_tokens}"
        )


def context(case: Case) -> Iterator[str]:
    """Check that sequences stay within the length in which the source model is what we build."""
    length, spec = case.config.data.seq_length, case.spec
    windows = [window for window in spec.attention_windows if window is not None]
    if windows and length > min(windows):
        yield (
            f"data.seq_length ({length}) must be at most the source's sliding_window "
            f"({min(windows)}): within it, attention is the same with and without a window, and "
            f"longer windows are not supported.\n  largest data.seq_length: {min(windows)}"
        )
    scaling = spec.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        limit = scaling.original_max_position_embeddings
        if length > limit:
            yield (
                f"data.seq_length ({length}) must be at most max_position_embeddings ({limit}) of "
                "a source with rope_type dynamic: beyond it, frequencies depend on each text's "
                f"length.\n  largest data.seq_length: {limit}"
            )


def recompute(case: Case) -> Iterator[str]:
    """Check that the engine supports the recomputation setting."""
    run = case.config.run
    if case.config.train.recompute == "selective" and run.engine == "torch" and run.device != "cpu":
        yield (
            "train.recompute (selective) on CUDA needs run.engine (torch) to be "
            "transformer_engine: Megatron-Core recomputes norms only with its modules, and the "
            "torch engine's experts recompute their activations with any setting.\n"
            "  set train.recompute to none, moe or full"
        )


def reset_attention(case: Case) -> Iterator[str]:
    """Check that the engine's attention supports resets at document boundaries."""
    data, p, train = case.config.data, case.config.parallel, case.config.train
    run = case.config.run
    if not data.reset_attention or run.device == "cpu" or run.engine == "torch":
        return
    for name, value in (
        ("parallel.context_parallel_size", p.context_parallel_size),
        ("train.micro_batch_size", train.micro_batch_size),
    ):
        if value > 1:
            yield (
                f"data.reset_attention (true) with Transformer Engine needs {name} ({value}) to be "
                "1: it takes packed documents as a single row.\n"
                "  set run.engine=torch, which has no such limit, or use more micro-batches"
            )
