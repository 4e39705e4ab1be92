"""The story of ``reference-loss``: what a mixture that adapts is measured against."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.config.run import RunConfig
from megatron_moe.data.reference import dense_losses, write_reference_losses
from megatron_moe.data.texts import open_texts
from megatron_moe.data.tokenizer import fingerprint_of
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import read_spec
from megatron_moe.log import console
from megatron_moe.runtime.world import World


def reference_loss(config: RunConfig, world: World, out: Path) -> None:
    """Write the dense model's loss on each domain: what a mixture that moves is measured against.

    Runs on one rank; the model must fit there whole.
    """
    spec = read_spec(config.source.path)
    texts = open_texts(config, vocab_size=spec.vocab_size)
    if without := [name for name in texts.training if name not in texts.validation]:
        raise ConfigError(
            f"no held-out text of {', '.join(without)} to evaluate the dense model on.\n"
            "  set data.validation_fraction, or a validation_path for each"
        )
    for line in texts.remarks:
        console.print(line)
    losses = dense_losses(config, texts.validation, device=world.device)
    write_reference_losses(
        out,
        losses,
        dense=str(config.source.path),
        tokenizer=fingerprint_of(config.source.path),
        seq_length=config.data.seq_length,
        validation_samples=config.data.validation_samples,
    )
    console.print("\n".join(f"{name}: {loss:.4f} nats per token" for name, loss in losses.items()))
