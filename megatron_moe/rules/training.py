"""Rules of text, mixtures and the schedule."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.mixtures import starting_weights
from megatron_moe.config.train import Optimizer
from megatron_moe.errors import ConfigError
from megatron_moe.rules.case import Case

LARGEST_BETA_IN_BF16 = 1 - 2**-8
"""Decay that still changes any value of 8 significant bits: half a unit in the last place is at
most 2^-8 of the value."""


def schedule(case: Case) -> Iterator[str]:
    """Check that the learning rate reaches its peak and decays."""
    optimizer, steps = case.config.optimizer, case.config.train.steps
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr ({optimizer.min_lr}) must be at most optimizer.lr ({optimizer.lr}): "
            "the schedule decays from lr to min_lr.\n"
            f"  largest optimizer.min_lr: {optimizer.lr}"
        )
    by_fraction = optimizer.lr_warmup_fraction is not None
    if by_fraction and optimizer.warmup_steps != Optimizer.model_fields["warmup_steps"].default:
        yield (
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) and optimizer.lr_warmup_fraction "
            f"({optimizer.lr_warmup_fraction}) are two lengths of the warm-up.\n"
            "  set only one of them"
        )
    length, warmup = optimizer.decay_length(steps), optimizer.warmup_length(steps)
    name = "train.steps" if optimizer.lr_decay_steps is None else "optimizer.lr_decay_steps"
    if length and warmup >= length and not by_fraction:
        yield (
            f"optimizer.warmup_steps ({warmup}) must be less than {name} "
            f"({length}): otherwise the learning rate never reaches its peak.\n"
            f"  largest optimizer.warmup_steps: {length - 1}"
        )
    elif length and warmup >= length:
        yield (
            f"optimizer.lr_warmup_fraction ({optimizer.lr_warmup_fraction}) of {name} ({length}) "
            "rounds to all of its steps: the learning rate never reaches its peak.\n"
            "  set a smaller optimizer.lr_warmup_fraction"
        )
    if optimizer.lr_decay_style == "inverse-square-root" and length and not warmup:
        yield (
            "optimizer.lr_decay_style (inverse-square-root) requires a warm-up "
            "(optimizer.warmup_steps is 0): the learning rate is lr * sqrt(warm-up steps / step), "
            "and would fall to a tenth within 100 steps.\n"
            "  set optimizer.warmup_steps, or another optimizer.lr_decay_style"
        )
    yield from _stable_then_decay(optimizer, name, length, warmup)


def _stable_then_decay(optimizer: Optimizer, name: str, length: int, warmup: int) -> Iterator[str]:
    decay, style = optimizer.lr_wsd_decay_steps, optimizer.lr_decay_style
    if style != "WSD":
        for setting in ("lr_wsd_decay_steps", "lr_wsd_decay_style"):
            value = getattr(optimizer, setting)
            if value != Optimizer.model_fields[setting].default:
                yield (
                    f"optimizer.{setting} ({value}) requires optimizer.lr_decay_style ({style}) to "
                    f"be WSD: no other style has a decay of its own at the end.\n"
                    f"  set optimizer.lr_decay_style=WSD, or leave optimizer.{setting} unset"
                )
    elif decay is None:
        yield (
            "optimizer.lr_decay_style (WSD) requires optimizer.lr_wsd_decay_steps: the length of "
            "the decay at the end.\n  often used: a tenth to a fifth of the run"
        )
    elif length and decay > length - warmup:
        yield (
            f"optimizer.lr_wsd_decay_steps ({decay}) must be at most {name} ({length}) minus the "
            f"warm-up ({warmup}): the decay starts after the warm-up.\n"
            f"  largest optimizer.lr_wsd_decay_steps: {length - warmup}"
        )


def weight_decay(case: Case) -> Iterator[str]:
    """Check that an increase of weight decay has a start and an end, and a constant one neither."""
    optimizer = case.config.optimizer
    style = optimizer.weight_decay_incr_style
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if style == "constant":
        for name, value in (("start_weight_decay", start), ("end_weight_decay", end)):
            if value is not None:
                yield (
                    f"optimizer.{name} ({value}) requires optimizer.weight_decay_incr_style "
                    "(constant) to be linear or cosine: a constant decay is optimizer.weight_decay."
                    f"\n  leave optimizer.{name} unset, or set optimizer.weight_decay_incr_style"
                )
    elif start is None or end is None:
        yield (
            f"optimizer.weight_decay_incr_style ({style}) requires optimizer.start_weight_decay "
            "and optimizer.end_weight_decay, the ends of the increase.\n  set both"
        )
    elif start > end:
        yield (
            f"optimizer.start_weight_decay ({start}) must be at most optimizer.end_weight_decay "
            f"({end}): Megatron-Core only increases weight decay.\n"
            f"  largest optimizer.start_weight_decay: {end}"
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


def gradients(case: Case) -> Iterator[str]:
    """Check that gradients have a precision below that of the run only with bf16 weights."""
    train = case.config.train
    if not train.grad_reduce_in_fp32 and train.precision != "bf16":
        yield (
            f"train.grad_reduce_in_fp32 (false) requires train.precision ({train.precision}) to be "
            "bf16: gradients otherwise have the dtype of the weights.\n"
            "  set train.precision=bf16, or leave train.grad_reduce_in_fp32 unset"
        )


def muon(case: Case) -> Iterator[str]:
    """Check that settings of Muon belong to a run that uses it."""
    optimizer = case.config.optimizer
    for name in ("muon_momentum", "muon_extra_scale_factor"):
        value, default = getattr(optimizer, name), Optimizer.model_fields[name].default
        if optimizer.optimizer != "muon" and value != default:
            yield (
                f"optimizer.{name} ({value}) requires optimizer.optimizer "
                f"({optimizer.optimizer}) to be muon: AdamW does not use it.\n"
                f"  set optimizer.optimizer=muon, or leave optimizer.{name} unset"
            )


def moments(case: Case) -> Iterator[str]:
    """Check that adam can store moments as configured, and that bf16 can hold their decay."""
    optimizer = case.config.optimizer
    stored = {
        "exp_avg_dtype": optimizer.exp_avg_dtype,
        "exp_avg_sq_dtype": optimizer.exp_avg_sq_dtype,
        "optimizer_cpu_offload": "true" if optimizer.optimizer_cpu_offload else "false",
    }
    for name, value in stored.items():
        if value in ("bf16", "true") and optimizer.optimizer != "adam":
            yield (
                f"optimizer.{name} ({value}) requires optimizer.optimizer ({optimizer.optimizer}) "
                "to be adam: Megatron-Core's Muon keeps its momentum in fp32 on the GPU.\n"
                f"  set optimizer.optimizer=adam, or leave optimizer.{name} unset"
            )
    for name, beta in (
        ("exp_avg_dtype", "adam_beta1"),
        ("exp_avg_sq_dtype", "adam_beta2"),
    ):
        value = getattr(optimizer, beta)
        if stored[name] == "bf16" and value > LARGEST_BETA_IN_BF16:
            yield (
                f"optimizer.{name} (bf16) requires optimizer.{beta} ({value}) to be at most "
                f"1 - 2^-8 = {LARGEST_BETA_IN_BF16}: bf16 has 8 bits, so a mean that decays by "
                "less in a step is rounded back and never falls.\n"
                f"  set optimizer.{name}=fp32, or optimizer.{beta}=0.99"
            )


def local_copies(case: Case) -> Iterator[str]:
    """Check that local copies are written at least as often as checkpoints."""
    checkpoint = case.config.checkpoint
    if checkpoint.local_dir is not None and checkpoint.local_interval > checkpoint.interval:
        yield (
            f"checkpoint.local_interval ({checkpoint.local_interval}) must be at most "
            f"checkpoint.interval ({checkpoint.interval}): a local copy is used only if it is not "
            "older than the newest checkpoint.\n"
            f"  largest checkpoint.local_interval: {checkpoint.interval}"
        )


def device_check(case: Case) -> Iterator[str]:
    """Check that the devices are tested at least once."""
    interval, steps = case.config.guard.device_check_interval, case.config.train.steps
    if interval is not None and interval > steps:
        yield (
            f"guard.device_check_interval ({interval}) must be at most train.steps ({steps}): no "
            "step would be computed twice.\n"
            f"  largest guard.device_check_interval: {steps}, or leave it unset"
        )
