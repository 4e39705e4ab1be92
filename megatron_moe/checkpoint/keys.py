"""Map rows of the name table to tensor names in a checkpoint."""

from __future__ import annotations

from megatron_moe.hf.names import Row, Scope


def checkpoint_key(row: Row, *, layer: int | None, moe_layer: bool) -> str:
    """Return Megatron-Core's global name of a row: as with Transformer Engine, experts on one axis.

    >>> from megatron_moe.hf.names import ROW_OF_ROLE
    >>> checkpoint_key(ROW_OF_ROLE["expert_fc1"], layer=3, moe_layer=True)
    'decoder.layers.3.mlp.experts.experts.linear_fc1.weight'
    """
    template = row.megatron[-1]
    if row.role == "ffn_norm" and moe_layer:
        template = row.megatron[0]  # a separate module in MoE layers, not fused
    if row.scope is Scope.EXPERT:
        template = row.megatron[-1].replace("experts.", "experts.experts.").replace("{expert}", "")
    if row.scope is Scope.ADAPTER:
        template = template.replace("local_experts.{expert}.", "experts.")
    return template.format(layer=layer)
