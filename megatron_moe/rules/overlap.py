"""Rules of settings that overlap the exchange of tokens between ranks with computation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.rules.case import Case


def shared_experts(case: Case) -> Iterator[str]:
    """Check that there is a shared expert, and communication that it can overlap with."""
    moe, run = case.config.moe, case.config.run
    if not moe.moe_shared_expert_overlap:
        return
    setting, way_out = "moe.moe_shared_expert_overlap (true)", "leave it unset"
    if not moe.shared_size:
        yield (
            f"{setting} needs moe.moe_shared_expert_intermediate_size: there is no shared expert "
            f"to compute meanwhile.\n  {way_out}"
        )
    if moe.moe_token_dispatcher_type == "allgather":
        yield (
            f"{setting} needs moe.moe_token_dispatcher_type (allgather) to be alltoall or flex: "
            "only they run the shared expert between their parts.\n"
            f"  set moe.moe_token_dispatcher_type=alltoall, or {way_out}"
        )
    if run.device == "cpu":
        yield (
            f"{setting} needs run.device (cpu) to be cuda: a CPU has no second stream of kernels.\n"
            f"  {way_out}"
        )


def expert_exchange(case: Case) -> Iterator[str]:
    """Check that layers can run piece by piece, with another micro-batch in between.

    Megatron-Core requires the same of dispatcher, recomputation, precision and shared experts.
    `layout.expert_overlap` checks the layout.
    """
    train, moe, teacher = case.config.train, case.config.moe, case.config.teacher
    if not train.overlap_moe_expert_parallel_comm:
        return
    setting = "train.overlap_moe_expert_parallel_comm (true)"
    way_out = "leave train.overlap_moe_expert_parallel_comm unset"
    if moe.moe_token_dispatcher_type == "allgather":
        yield (
            f"{setting} needs moe.moe_token_dispatcher_type (allgather) to be alltoall or flex: "
            f"the others have no separate exchange.\n"
            f"  set moe.moe_token_dispatcher_type=alltoall, or {way_out}"
        )
    if train.recompute in ("moe", "full"):
        yield (
            f"{setting} cannot be combined with train.recompute ({train.recompute}): a MoE layer "
            "that is recomputed as a whole cannot run piece by piece.\n"
            f"  set train.recompute=none (or selective, with Transformer Engine), or {way_out}"
        )
    if train.precision != "bf16":
        yield (
            f"{setting} needs train.precision ({train.precision}) to be bf16: Megatron-Core has "
            f"this schedule for 16-bit models only.\n  {way_out}"
        )
    if moe.moe_shared_expert_overlap:
        yield (
            f"{setting} cannot be combined with moe.moe_shared_expert_overlap (true): the exchange "
            "overlaps with another micro-batch instead.\n"
            "  leave one of them unset"
        )
    if teacher.teaches_layers:
        name = "layers_weight" if teacher.layers_weight else "router_weight"
        yield (
            f"{setting} cannot be combined with teacher.{name} ({getattr(teacher, name)}): the "
            "teacher compares whole MoE layers, which then run piece by piece.\n"
            f"  set teacher.{name}=0, or {way_out}"
        )


def weight_gradients(case: Case) -> Iterator[str]:
    """Check that weight gradients can be computed later than gradients of inputs."""
    train, run = case.config.train, case.config.run
    if not train.delay_wgrad_compute:
        return
    setting, way_out = (
        "train.delay_wgrad_compute (true)",
        "leave train.delay_wgrad_compute unset",
    )
    if not train.overlap_moe_expert_parallel_comm:
        yield (
            f"{setting} needs train.overlap_moe_expert_parallel_comm: only its schedule computes "
            f"them later.\n  set train.overlap_moe_expert_parallel_comm=true, or {way_out}"
        )
    if run.engine == "torch" or run.device == "cpu":
        yield (
            f"{setting} needs run.engine to be transformer_engine and run.device to be cuda: only "
            f"its layers can compute weight gradients apart.\n  {way_out}"
        )
    if train.tp_comm_overlap:
        yield (
            f"{setting} cannot be combined with train.tp_comm_overlap (true), which overlaps the "
            f"same products with tp communication.\n  leave one of them unset"
        )
    if train.freeze or any(stage.freeze for stage in train.stages):
        yield (
            f"{setting} cannot be combined with train.freeze or frozen parts in train.stages: "
            "Transformer Engine waits for the weight gradient of every layer.\n"
            f"  train all parts, or {way_out}"
        )
