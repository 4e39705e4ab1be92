"""Read weights of a checkpoint with their adapters added."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.config.train import Lora
from megatron_moe.hf.names import ADAPTERS, ROW_OF_ROLE, Row, role_of


def read_merged(
    tensors: GlobalTensors, key: str, row: Row, lora: Lora, *, layer: int | None,
    expert: int | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return ``W + alpha / rank * B A``, or W if it has no adapter; computed in fp32.

    Args:
        tensors: The checkpoint.
        key: Name of W in it.
        row: Row of W in the name table.
        lora: Adapters of the run.
        layer: Layer of W; None outside the layers.
        expert: Expert to read; None if the tensor does not have an axis of experts.
        dtype: Dtype of the result.

    Raises:
        CheckpointError: The checkpoint lacks a tensor.
    """
    if row.role not in ADAPTERS or role_of(row) not in lora.frozen:
        return tensors.read(key, index=expert, dtype=dtype)
    keys = (
        checkpoint_key(ROW_OF_ROLE[one], layer=layer, moe_layer=True) for one in ADAPTERS[row.role]
    )
    weight, a_RI, b_OR = (
        tensors.read(name, index=expert, dtype=torch.float32) for name in (key, *keys)
    )
    return torch.addmm(weight, b_OR, a_RI, alpha=lora.alpha / lora.rank).to(dtype)
