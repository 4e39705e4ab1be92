"""Rules of fp8 products, which need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.train import Train
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.rules.case import Case
from megatron_moe.rules.layout import fused_rows

FP8_UNIT = 16
"""Divisor of both sides of all matrices of an fp8 product (Transformer Engine)."""


def fp8(case: Case) -> Iterator[str]:
    """Check that products can be in fp8: engine, precision, sizes of matrices, tokens."""
    train, run = case.config.train, case.config.run
    if train.fp8 is None:
        if train.fp8_recipe != Train.model_fields["fp8_recipe"].default:
            yield (
                f"train.fp8_recipe ({train.fp8_recipe}) has no effect without train.fp8.\n"
                "  set train.fp8=hybrid, or leave train.fp8_recipe unset"
            )
        return
    setting = f"train.fp8 ({train.fp8})"
    if run.engine == "torch" or run.device == "cpu":
        yield (
            f"{setting} needs run.engine to be transformer_engine and run.device to be cuda: only "
            "its layers have fp8 products.\n  leave train.fp8 unset"
        )
    if train.precision != "bf16":
        yield (
            f"{setting} needs train.precision ({train.precision}) to be bf16: products in fp8 are "
            "rounded far below fp32 weights.\n  set train.precision=bf16"
        )
    if train.tp_comm_overlap:
        yield (
            f"{setting} cannot be combined with train.tp_comm_overlap (true): its buffers hold "
            "bf16 activations.\n  leave train.tp_comm_overlap unset"
        )
    for name, size in _sides(case).items():
        if size % FP8_UNIT:
            yield (
                f"{setting} needs {name} ({size:g}) to be a multiple of {FP8_UNIT}: each side of a "
                "matrix in an fp8 product is. Experts' tokens are padded, nothing else is.\n"
                "  choose other sizes or degrees of parallelism, or leave train.fp8 unset"
            )


def _sides(case: Case) -> dict[str, float]:
    """Return the sides of the matrices that one rank multiplies, by a name."""
    spec, moe, p = case.spec, case.config.moe, case.config.parallel
    tp, etp, cp = p.tensor_parallel_size, p.expert_tensor_parallel_size, p.context_parallel_size
    tokens = case.config.data.seq_length * case.config.train.micro_batch_size
    sides = {
        "hidden_size": spec.hidden_size,
        "rows of the fused query, key and value / tp": fused_rows(spec) / tp,
        "num_attention_heads * head_dim / tp": spec.num_attention_heads * spec.kv_channels / tp,
        "neurons of an expert / etp": case.expert_ffn / etp,
        "data.seq_length * train.micro_batch_size / (cp * tp)": tokens / (cp * tp),
    }
    if moe.shared_size:
        sides["moe.moe_shared_expert_intermediate_size / tp"] = moe.shared_size / tp
    if len(moe_layer_ids(moe, spec.num_layers)) < spec.num_layers:
        sides["intermediate_size of dense layers / tp"] = spec.ffn_hidden_size / tp
    return sides
