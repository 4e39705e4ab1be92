"""Turn a micro-batch into the arguments of a model."""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_moe.config.data import Data
from megatron_moe.data.batches import Batch
from megatron_moe.data.packing import document_bounds
from megatron_moe.model.build import Model
from megatron_moe.runtime.engine import Engine


def on_device(batch: Batch, model: Model) -> Batch:
    """Return the batch on the model's device."""
    return batch.map(lambda x: x.to(model.device, non_blocking=True))


def model_inputs(batch: Batch, data: Data, model: Model) -> dict[str, Any]:
    """Return the arguments of Megatron-Core's model for a batch on its device, without labels."""
    inputs = {"input_ids": batch.tokens_BS, "position_ids": batch.position_ids_BS}
    if data.reset_attention:
        return inputs | document_arguments(batch.position_ids_BS, model.engine)
    return inputs | {"attention_mask": None}


def document_arguments(position_ids_BS: Tensor, engine: Engine) -> dict[str, Any]:
    """Return arguments that keep attention within documents: `SdpaAttention`'s mask, or bounds.

    Transformer Engine takes bounds of a single row without context parallelism; the rules reject
    other configurations.
    """
    if engine.is_torch:
        return {"attention_mask": position_ids_BS}
    bounds = document_bounds(position_ids_BS[0])
    longest = int(bounds.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {"attention_mask": None, "packed_seq_params": packed}
