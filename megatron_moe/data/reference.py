"""Reference losses of the dense model on each domain, for adaptive mixtures.

Shape letters: ``B`` batch, ``S`` seq_length, ``V`` vocabulary, ``T`` tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.batches import Batch, validation_batches
from megatron_moe.data.samples import Text
from megatron_moe.errors import DataError
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.load import load_model
from megatron_moe.json_text import parse_json
from megatron_moe.model.attention import document_mask
from megatron_moe.regular_file import regular


@torch.no_grad()
def dense_losses(
    config: RunConfig, texts: dict[str, Text], *, device: torch.device
) -> dict[str, float]:
    """Return the dense model's nats per token on the validation sequences of each domain.

    Args:
        config: Gives the dense model (loaded whole with transformers), the precision, and the
            number of sequences of each text, from its beginning.
        texts: Held-out text of each domain.
        device: Device to compute on.
    """
    dtype = OF_PRECISION[config.train.precision]
    model = load_model(config.source.path, device=device, dtype=dtype)
    losses = {}
    for name, text in texts.items():
        batches = validation_batches(
            text,
            num_samples=config.data.validation_samples,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
        )
        placed = (batch.map(lambda x: x.to(device)) for batch in batches)
        sums = torch.stack([_sums(model, batch, config.data.reset_attention) for batch in placed])
        total, tokens = sums.sum(dim=0).tolist()
        losses[name] = total / tokens
    return losses


def _sums(model: Any, batch: Batch, reset_attention: bool) -> Tensor:
    """Return the sum of the losses that count, and their number: ``(2,)``, float64."""
    mask_B1SS = None
    if reset_attention:
        position_S = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
        mask_B1SS = document_mask(batch.position_ids_BS, position_S, length=len(position_S))
    logits_BSV = model(batch.tokens_BS, attention_mask=mask_B1SS).logits.float()
    # Row by row: over a strided vocabulary, fp32 sums of 49152 exponentials are off by 1e-4 nats.
    logits_TV, labels_T = logits_BSV.flatten(0, 1), batch.labels_BS.flatten()
    losses_T = F.cross_entropy(logits_TV, labels_T, reduction="none")
    losses_BS = losses_T.view_as(batch.labels_BS)
    counted_BS = batch.loss_mask_BS.double()
    return torch.stack([(losses_BS * counted_BS).sum(), counted_BS.sum()])


def write_reference_losses(path: Path, losses: dict[str, float], **origin: Any) -> None:
    """Write a file for `read_reference_losses`, together with the ``origin`` of the losses."""
    write_text(path, json.dumps({"losses": losses, **origin}, indent=2) + "\n")


def read_reference_losses(
    path: Path, domains: Sequence[str], *, tokenizer: str
) -> dict[str, float]:
    """Read losses in nats per token, written by `write_reference_losses` or by hand.

    Args:
        path: JSON file, ``{"losses": {domain: loss}, "tokenizer": ...}`` or ``{domain: loss}``.
        domains: Domains whose losses to return.
        tokenizer: Fingerprint of the run's tokenizer. Nats per token of another tokenizer cannot
            be compared.

    Raises:
        DataError: The file cannot be read, was made with another tokenizer, or lacks a domain.
    """
    try:
        content = parse_json(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the reference losses {path}: {error}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{path} must contain an object {{domain: loss}}, not {kind}")
    if (made_with := content.get("tokenizer")) not in (None, tokenizer):
        raise DataError(
            f"{path} was made with another tokenizer ({str(made_with)[:12]}) than the dense "
            f"model's ({tokenizer[:12]}), so that their nats per token cannot be compared.\n"
            "  run megatron-moe reference-loss again with a model that has this tokenizer"
        )
    losses = content.get("losses", content)
    if missing := [name for name in domains if not _is_loss(losses.get(name))]:
        raise DataError(
            f"{path} has no loss for {', '.join(missing)}; it has {', '.join(losses) or 'none'}"
        )
    return {name: float(losses[name]) for name in domains}


def _is_loss(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
