"""Summarize the data of a run for the log, before the first step."""

from __future__ import annotations

from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import BlendState, epochs_of_domains, repetition_warnings
from megatron_moe.data.texts import Texts


def announcement(texts: Texts, blend: BlendState, config: RunConfig) -> str:
    """Return one line per domain, then skipped records, then warnings about repeated data."""
    chunks = {name: text.num_chunks for name, text in texts.training.items()}
    weights = blend.by_domain
    num_samples = samples_of_run(config)
    epochs = epochs_of_domains(weights, chunks, num_samples=num_samples)
    length = config.data.seq_length
    lines = [
        f"data {name}: {count} samples of {length} tokens, weight {weights[name]:.4g}, "
        f"{epochs[name]:.2f} epochs in this run"
        for name, count in chunks.items()
    ]
    if config.data.mixing.update != "never":
        lines.append("epochs assume the current weights, which will change during the run")
    repeated = repetition_warnings(epochs, limit=config.data.warn_above_epochs)
    return "\n".join([*lines, *texts.remarks, *repeated])


def samples_of_run(config: RunConfig) -> int:
    """Return the number of sequences of a run; its first batches may be smaller."""
    train, samples, step = config.train, 0, 0
    while train.rampup_batch_size and samples < train.rampup_batch_size.samples:
        if step == train.steps:
            return samples
        samples, step = samples + train.batch_size_after(samples), step + 1
    return samples + (train.steps - step) * train.global_batch_size
