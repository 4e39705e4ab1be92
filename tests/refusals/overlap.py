"""Refused settings of communication beside computation, and of low precision."""

from legal_runs import parallel

SHARED_OVERLAP = {
    "moe.moe_shared_expert_overlap": True, "moe.moe_ffn_hidden_size": 4,
    "moe.moe_shared_expert_intermediate_size": 16, "upcycle.method": "split_random",
}  # fmt: skip
EXCHANGE = {"train.overlap_moe_expert_parallel_comm": True} | parallel(ep=2)
DELAYED = EXCHANGE | {"train.delay_wgrad_compute": True}

# Rule, changes to a legal configuration, world size, complete message.
REFUSALS = [
    ("fp8-recipe", {"train.fp8_recipe": "blockwise"}, 1,
     "train.fp8_recipe (blockwise) has no effect without train.fp8.\n"
     "  set train.fp8=hybrid, or leave train.fp8_recipe unset"),
    ("fp8-engine", {"train.fp8": "hybrid", "run.engine": "torch"}, 1,
     "train.fp8 (hybrid) needs run.engine to be transformer_engine and run.device to be cuda: only "
     "its layers have fp8 products.\n  leave train.fp8 unset"),
    ("fp8-precision", {"train.fp8": "hybrid", "train.precision": "fp32"}, 1,
     "train.fp8 (hybrid) needs train.precision (fp32) to be bf16: products in fp8 are rounded far "
     "below fp32 weights.\n  set train.precision=bf16"),
    ("fp8-overlap", parallel(tp=3) | {"train.fp8": "e4m3", "train.tp_comm_overlap": True}, 3,
     "train.fp8 (e4m3) cannot be combined with train.tp_comm_overlap (true): its buffers hold bf16 "
     "activations.\n  leave train.tp_comm_overlap unset"),
    ("fp8-tokens", {"train.fp8": "hybrid", "data.seq_length": 56}, 1,
     "train.fp8 (hybrid) needs data.seq_length * train.micro_batch_size / (cp * tp) (56) to be a "
     "multiple of 16: each side of a matrix in an fp8 product is. Experts' tokens are padded, "
     "nothing else is.\n"
     "  choose other sizes or degrees of parallelism, or leave train.fp8 unset"),
    ("shared-overlap-none", {"moe.moe_shared_expert_overlap": True}, 1,
     "moe.moe_shared_expert_overlap (true) needs moe.moe_shared_expert_intermediate_size: there is "
     "no shared expert to compute meanwhile.\n  leave it unset"),
    ("shared-overlap-allgather", SHARED_OVERLAP | {"moe.moe_token_dispatcher_type": "allgather"}, 1,
     "moe.moe_shared_expert_overlap (true) needs moe.moe_token_dispatcher_type (allgather) to be "
     "alltoall or flex: only they run the shared expert between their parts.\n"
     "  set moe.moe_token_dispatcher_type=alltoall, or leave it unset"),
    ("shared-overlap-cpu", SHARED_OVERLAP | {"run.device": "cpu"}, 1,
     "moe.moe_shared_expert_overlap (true) needs run.device (cpu) to be cuda: a CPU has no second "
     "stream of kernels.\n  leave it unset"),
    ("exchange-dispatcher", EXCHANGE | {"moe.moe_token_dispatcher_type": "allgather"}, 2,
     "train.overlap_moe_expert_parallel_comm (true) needs moe.moe_token_dispatcher_type "
     "(allgather) to be alltoall or flex: the others have no separate exchange.\n"
     "  set moe.moe_token_dispatcher_type=alltoall, or leave "
     "train.overlap_moe_expert_parallel_comm unset"),
    ("exchange-recompute", EXCHANGE | {"train.recompute": "moe"}, 2,
     "train.overlap_moe_expert_parallel_comm (true) cannot be combined with train.recompute (moe): "
     "a MoE layer that is recomputed as a whole cannot run piece by piece.\n"
     "  set train.recompute=none (or selective, with Transformer Engine), or leave "
     "train.overlap_moe_expert_parallel_comm unset"),
    ("exchange-fp32", EXCHANGE | {"train.precision": "fp32"}, 2,
     "train.overlap_moe_expert_parallel_comm (true) needs train.precision (fp32) to be bf16: "
     "Megatron-Core has this schedule for 16-bit models only.\n"
     "  leave train.overlap_moe_expert_parallel_comm unset"),
    ("exchange-shared", EXCHANGE | SHARED_OVERLAP, 2,
     "train.overlap_moe_expert_parallel_comm (true) cannot be combined with "
     "moe.moe_shared_expert_overlap (true): the exchange overlaps with another micro-batch "
     "instead.\n  leave one of them unset"),
    ("exchange-teacher", EXCHANGE | {"teacher.layers_weight": 1.0}, 2,
     "train.overlap_moe_expert_parallel_comm (true) cannot be combined with teacher.layers_weight "
     "(1.0): the teacher compares whole MoE layers, which then run piece by piece.\n"
     "  set teacher.layers_weight=0, or leave train.overlap_moe_expert_parallel_comm unset"),
    ("delayed-alone", {"train.delay_wgrad_compute": True}, 1,
     "train.delay_wgrad_compute (true) needs train.overlap_moe_expert_parallel_comm: only its "
     "schedule computes them later.\n  set train.overlap_moe_expert_parallel_comm=true, or leave "
     "train.delay_wgrad_compute unset"),
    ("delayed-torch", DELAYED | {"run.engine": "torch"}, 2,
     "train.delay_wgrad_compute (true) needs run.engine to be transformer_engine and run.device to "
     "be cuda: only its layers can compute weight gradients apart.\n"
     "  leave train.delay_wgrad_compute unset"),
    ("delayed-tp-overlap", DELAYED | parallel(tp=2, ep=2) | {"train.tp_comm_overlap": True}, 2,
     "train.delay_wgrad_compute (true) cannot be combined with train.tp_comm_overlap (true), which "
     "overlaps the same products with tp communication.\n  leave one of them unset"),
    ("delayed-frozen", DELAYED | {"train.freeze": ["attention"]}, 2,
     "train.delay_wgrad_compute (true) cannot be combined with train.freeze or frozen parts in "
     "train.stages: Transformer Engine waits for the weight gradient of every layer.\n"
     "  train all parts, or leave train.delay_wgrad_compute unset"),
]  # fmt: skip
