"""Add outputs to the residual stream as OLMo-2 (norms) and Granite (multipliers) do.

Shape letters: S positions, B sequences, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.hf.spec import ModelSpec, Multipliers
from megatron_moe.model.norm import RMSNorm


class ResidualAdd(torch.nn.Module):
    """Module for Megatron-Core's bias_dropout_add slots, without bias and dropout.

    Args:
        config: Configuration of the model.
        multiplier: Factor of what is added.
        norm: Whether what is added passes an RMSNorm first.
    """

    def __init__(self, config: TransformerConfig, *, multiplier: float, norm: bool) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if norm else None

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that Megatron-Core calls with output, residual and dropout."""
        return self._add

    def _add(
        self, output: tuple[Tensor, Tensor | None], residual_SBD: Tensor, dropout: float
    ) -> Tensor:
        output_SBD, bias = output
        assert bias is None
        assert dropout == 0
        return residual_SBD + self.added(output_SBD)

    def added(self, output_SBD: Tensor) -> Tensor:
        """Return what is added for the output of attention or of an FFN."""
        if self.norm is not None:
            output_SBD = self.norm(output_SBD)
        return output_SBD if self.multiplier == 1 else output_SBD * self.multiplier


def with_residual_adds(
    block: TransformerBlockSubmodules,
    config: TransformerConfig,
    spec: ModelSpec,
    *,
    linear: Any = None,
) -> TransformerBlockSubmodules:
    """Set the residual additions of the block's layers, and remove norms before their parts.

    Args:
        block: Layer specs of a chunk.
        config: Configuration of the model.
        spec: Shape of the source model.
        linear: Class that replaces column-parallel layers which contain a norm, if there are any.
    """
    layers: Any = block.layer_specs
    if not spec.post_norms and spec.multipliers.residual == 1:
        return block
    for layer in layers:
        parts = layer.submodules
        add = {"config": config, "multiplier": spec.multipliers.residual, "norm": spec.post_norms}
        parts.self_attn_bda = ModuleSpec(module=ResidualAdd, params=add)
        parts.mlp_bda = ModuleSpec(module=ResidualAdd, params=add)
        if spec.post_norms:
            parts.input_layernorm, parts.pre_mlp_layernorm = IdentityOp, IdentityOp
            if linear is not None:
                parts.self_attention.submodules.linear_qkv = linear
                feed_forward = parts.mlp.keywords["submodules"]  # of a dense FFN or of a MoE layer
                if hasattr(feed_forward, "linear_fc1"):
                    feed_forward.linear_fc1 = linear
    return block


def multiply_ends(module: GPTModel, multipliers: Multipliers) -> None:
    """Multiply a chunk's embeddings, and divide its logits, if it has them.

    The final norm is divided instead of the logits: they are a product with its output, which is
    smaller.
    """
    if module.pre_process and multipliers.embedding != 1:
        module.embedding.register_forward_hook(partial(_times, multipliers.embedding))
    if module.post_process and multipliers.logits != 1:
        norm: Any = module.decoder.final_layernorm
        norm.register_forward_hook(partial(_times, 1 / multipliers.logits))


def _times(factor: float, module: Any, args: Any, output_SBD: Tensor) -> Tensor:
    return output_SBD * factor
