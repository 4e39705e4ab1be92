"""Run calibration text through the model one layer at a time, each rank its own sequences.

At any time a rank holds the weights of one layer and the hidden states of its sequences. So a model
of any size fits, under any number of ranks, and a layer can be changed before the next one sees
what it gives. The blocks are Megatron-Core's, not sharded.

Shape letters: S seq_length, D hidden_size, B = 1 sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.judging import dense_config
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.construct.measure import normalized
from megatron_moe.data.batches import Batch
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.model.build import Chunk, build_model
from megatron_moe.model.residual import ResidualAdd
from megatron_moe.model.upcycle import fill
from megatron_moe.parallel.groups import create_groups
from megatron_moe.runtime.engine import Engine
from megatron_moe.train.inputs import document_arguments


class LayerStream:
    """The blocks of a dense model, one in memory at a time, in fp32."""

    def __init__(self, config: RunConfig, dense: SourceCheckpoint, rank: int, engine: Engine):
        """Create process groups and one block; the groups of another layout must not exist."""
        as_dense = dense_config(config)
        train = as_dense.train.model_copy(update={"precision": "fp32"})
        updates = {"train": train, "parallel": Parallel()}
        self._config = as_dense.model_copy(update=updates)
        self._layout, groups = create_groups(Parallel(), seed=config.run.seed)
        self._dense, self._rank = dense, rank
        model = build_model(
            self._config, replace(dense.spec, num_layers=1), layout=self._layout, groups=groups,
            rank=rank, engine=engine,
        )  # fmt: skip
        self._model, self._module = model, model.modules[0].eval().requires_grad_(False)
        self._plan = make_expert_plan(dense.spec, self._config.moe, self._config.upcycle)
        self._residual_SBD = torch.empty(0)
        block: Any = self._module.decoder.layers[0]
        self._block = block
        block.pre_mlp_layernorm.register_forward_pre_hook(self._keep)
        block.mlp.forward = _nothing  # whoever uses this class computes the FFN
        self._fill(0, layers_only=False)

    @property
    def device(self) -> torch.device:
        """Device of the block."""
        return next(self._module.parameters()).device

    def embed(self, batch: Batch) -> Tensor:
        """Return the hidden states before the first layer, ``(S, 1, D)``."""
        batch = batch.map(lambda x: x.to(self.device))
        return self._module.embedding(batch.tokens_BS, batch.position_ids_BS)

    def load(self, layer: int) -> None:
        """Read the weights of a layer into the block."""
        self._fill(layer, layers_only=True)

    def attend(self, hidden_SBD: Tensor, batch: Batch) -> Tensor:
        """Return the residual stream between attention and FFN of the block, ``(S, 1, D)``."""
        batch = batch.map(lambda x: x.to(self.device))
        documents: dict[str, Any] = {"attention_mask": None}
        if self._config.data.reset_attention:
            documents = document_arguments(batch.position_ids_BS, self._model.engine)
        rotary = self._module.rotary_pos_emb(hidden_SBD.shape[0])
        self._block(hidden_states=hidden_SBD, rotary_pos_emb=rotary, **documents)
        return self._residual_SBD

    def ffn_input(self, residual_SBD: Tensor) -> Tensor:
        """Return the normalized input of the FFN, ``(S * B, D)``."""
        x_SBD = self._block.pre_mlp_layernorm(residual_SBD)
        return normalized(x_SBD, self._block.mlp).flatten(0, 1)

    def added(self, output_TD: Tensor) -> Tensor:
        """Return what the block adds to the residual stream for an output of its FFN."""
        add = self._block.mlp_bda
        return add.added(output_TD) if isinstance(add, ResidualAdd) else output_TD

    def _keep(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._residual_SBD = args[0]

    def _fill(self, layer: int, *, layers_only: bool) -> None:
        one = replace(self._model, chunks=(Chunk(self._module, range(layer, layer + 1)),))
        fill(
            one, [self._dense], self._plan, layout=self._layout, rank=self._rank,
            layers_only=layers_only,
        )  # fmt: skip


def _nothing(hidden_SBD: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Stand in for an FFN, whose output and bias are not used."""
    return hidden_SBD, None
