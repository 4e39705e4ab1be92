"""Low-rank adapters (LoRA, arXiv 2106.09685): add alpha / R * B A x to the output of a frozen W x.

tp shards W along one axis, and with it B (rows) or A (columns); the other matrix is whole on every
rank. With sequence parallelism, R numbers per token are communicated instead of D::

    query, key, value   h_sBR = A x_sBD of this rank's tokens    gather h_SBR     B's rows
    output projection   h_SBR = A's columns of x_SBQ             scatter h_sBR    B h_sBR

A whole matrix sees only the tokens of its rank, so Megatron-Core sums its gradient over tp, as it
does for norms. Experts with adapters are not sharded. Names are those of Megatron-Bridge.

Shape letters of this module:

    S  positions     s  those of this tp rank   B  micro_batch_size
    D  hidden_size   Q  width of all heads      R  rank of an adapter
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.config.train import Lora
from megatron_moe.experts.draws import Use, generator
from megatron_moe.hf.names import ADAPTERS, Row, Sharding
from megatron_moe.parallel.shards import ShardIndex


class Adapter(torch.nn.Module):
    """Low-rank product beside a linear layer; parameters are allocated but not initialized.

    Args:
        weight: The layer's weight on this rank.
        lora: Rank and factor.
        axis: Axis of the weight that tp shards: 0 for rows, 1 for columns.
        tp_group: Ranks that share the weight.
    """

    def __init__(self, weight: Tensor, lora: Lora, *, axis: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        linear: Any = partial(
            torch.nn.utils.skip_init, torch.nn.Linear, bias=False, dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip
        self.linear_in = linear(inputs, lora.rank)
        self.linear_out = linear(lora.rank, outputs)
        self.axis, self.tp_group, self.factor = axis, tp_group, lora.alpha / lora.rank
        sharded, whole = self.linear_out.weight, self.linear_in.weight
        if axis == 1:
            sharded, whole = whole, sharded
        for own in (sharded, whole):  # false if experts have other replicas than attention
            own.allreduce = getattr(weight, "allreduce", True)
        set_tensor_model_parallel_attributes(sharded, True, axis, 1)
        whole.sequence_parallel = tp_group.size() > 1  # sums its gradient over tp

    def forward(self, x_sBI: Tensor) -> Tensor:
        """Return what is added to the layer's output, for the layer's input."""
        h_sBR = self.linear_in(x_sBI) * self.factor
        if self.tp_group.size() > 1:
            rows = self.axis == 0
            exchange: Any = (
                gather_from_sequence_parallel_region
                if rows
                else reduce_scatter_to_sequence_parallel_region
            )
            h_sBR = exchange(h_sBR, group=self.tp_group)
        return self.linear_out(h_sBR)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Describe this rank's part of both matrices for a checkpoint."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"linear_out.weight": 0} if self.axis == 0 else {"linear_in.weight": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _WithAdapter(torch.nn.Module):
    """Mixin for the parallel linear layers of both engines."""

    adapter: Adapter

    def __init__(self, *args: Any, lora: Lora, axis: int, tp_group: Any, **kwargs: Any) -> None:
        super().__init__(*args, tp_group=tp_group, **kwargs)
        weight: Any = self.weight
        self.adapter = Adapter(weight, lora, axis=axis, tp_group=tp_group)

    def forward(self, x_sBI: Tensor) -> tuple[Tensor, Tensor | None]:
        out_SBO, bias = super().forward(x_sBI)
        return out_SBO + self.adapter(x_sBI), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        layer: Any = super()
        state = layer.sharded_state_dict(prefix, sharded_offsets, metadata)
        own = self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
        return {**state, **own}


def adapted(linear: type[torch.nn.Module], lora: Lora, *, axis: int) -> Any:
    """Return a builder of a parallel linear layer with an adapter.

    Args:
        linear: The layer's class, of either engine.
        lora: Rank and factor.
        axis: Axis of the weight that tp shards: 0 for rows, 1 for columns.
    """
    return partial(type(f"Lora{linear.__name__}", (_WithAdapter, linear), {}), lora=lora, axis=axis)


def fill_adapter(
    parameter: Tensor,
    row: Row,
    *,
    layer: int,
    part: ShardIndex,
    seed: int,
    expert: int | None = None,
) -> None:
    """Fill a matrix of an adapter: B with zeros, and A with random numbers.

    A is uniform in +-1 / sqrt(inputs), as in PEFT, and a function of seed, layer and weight alone.

    Args:
        parameter: This rank's part of the matrix.
        row: Its row of the name table.
        layer: Global layer id.
        part: Index of the shard in the group that shards the parameter.
        seed: Seed of the construction.
        expert: Global id of the expert, for an expert's adapter.
    """
    target = next(index for index, rows in enumerate(ADAPTERS.values()) if row.role in rows)
    if row.role.endswith("_out"):
        parameter.zero_()
        return
    rank, inputs = parameter.shape
    columns = slice(0, inputs)
    if row.sharding is Sharding.COLUMNS:
        inputs *= part.size
        columns = part.slice_of(inputs)
    key = (Use.ADAPTERS, target) if expert is None else (Use.ADAPTERS, target, expert)
    unit_RI = generator(seed, layer, *key).random((rank, inputs), dtype=np.float32)
    values_RI = (2 * unit_RI[:, columns] - 1) / np.sqrt(inputs)
    parameter.copy_(torch.from_numpy(values_RI.astype(np.float32)))
