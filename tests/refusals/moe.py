"""Refused settings of experts, routers and dispatchers."""

from legal_runs import parallel

# Rule, changes to a legal configuration, world size, complete message.
REFUSALS = [
    ("padding", {"moe.moe_pad_expert_input_to_capacity": True}, 1,
     "moe.moe_pad_expert_input_to_capacity (True) needs moe.moe_expert_capacity_factor: without "
     "it, no token is dropped.\n"
     "  set moe.moe_expert_capacity_factor, or leave moe.moe_pad_expert_input_to_capacity unset"),
    ("padding-over-ranks", {"moe.moe_pad_expert_input_to_capacity": True,
     "moe.moe_expert_capacity_factor": 1.0, "moe.capacity_scope": "sequence"}, 1,
     "moe.capacity_scope (sequence) cannot be combined with moe.moe_pad_expert_input_to_capacity "
     "(true): an expert then takes a different number of tokens from each rank, so there is no "
     "common size to pad to.\n"
     "  set moe.capacity_scope=rank"),
    ("padding-beyond-all", {"moe.moe_pad_expert_input_to_capacity": True,
     "moe.moe_expert_capacity_factor": 9.0, "moe.capacity_formula": "tokens_per_expert"}, 1,
     "moe.moe_expert_capacity_factor (9.0) gives a capacity above the number of tokens, which "
     "moe.moe_pad_expert_input_to_capacity (true) cannot pad to.\n"
     "  largest moe.moe_expert_capacity_factor: 8.0"),
    ("flex-alone", {"moe.moe_token_dispatcher_type": "flex"}, 1,
     "moe.moe_token_dispatcher_type (flex) needs parallel.expert_parallel_size (1) * "
     "parallel.expert_tensor_parallel_size (1) to be at least 2: every expert is on the rank of "
     "its tokens, and there is nothing to send.\n  set moe.moe_token_dispatcher_type=alltoall"),
    ("deepep-padding", parallel(ep=2) | {"moe.moe_token_dispatcher_type": "flex",
     "moe.moe_pad_expert_input_to_capacity": True, "moe.moe_expert_capacity_factor": 1.0}, 2,
     "moe.moe_flex_dispatcher_backend (deepep) cannot be combined with "
     "moe.moe_pad_expert_input_to_capacity (true): DeepEP sends each token to its chosen experts "
     "and has no padding.\n"
     "  set moe.moe_flex_dispatcher_backend=hybridep, or leave "
     "moe.moe_pad_expert_input_to_capacity unset"),
    ("bias", {"moe.moe_router_enable_expert_bias": True}, 1,
     "moe.moe_router_enable_expert_bias (true) needs moe.moe_router_score_function (softmax) to "
     "be sigmoid: the bias is added to independent scores of experts.\n"
     "  set moe.moe_router_score_function=sigmoid"),
    ("sigmoid-order", {"moe.moe_router_score_function": "sigmoid",
     "moe.router_order": "softmax_topk"}, 1,
     "moe.router_order (softmax_topk) has no effect with moe.moe_router_score_function "
     "(sigmoid): the scores of chosen experts are divided by their sum.\n"
     "  leave moe.router_order unset"),
    ("copy", {"moe.moe_ffn_hidden_size": 24}, 1,
     "moe.moe_ffn_hidden_size (24) must equal the dense model's intermediate_size (48) with "
     "upcycle.method (copy): each expert is the whole dense FFN.\n"
     "  leave moe.moe_ffn_hidden_size unset"),
    ("unread-plan", {"upcycle.plan": "runs/plan.safetensors"}, 1,
     "upcycle.plan (runs/plan.safetensors) has no effect with upcycle.method (copy), this router "
     "and scale, which need nothing from a plan file.\n"
     "  leave upcycle.plan unset"),
    ("unread-plan-of-weights", {"upcycle.plan": "p", "upcycle.method": "split_clustered",
     "moe.moe_ffn_hidden_size": 6}, 1,
     "upcycle.plan (p) has no effect with upcycle.method (split_clustered), this router and "
     "scale, which need nothing from a plan file.\n"
     "  leave upcycle.plan unset"),
    ("shared-expert", parallel(tp=3) | {
        "moe.moe_ffn_hidden_size": 5, "moe.moe_shared_expert_intermediate_size": 8,
        "upcycle.method": "split_random", "train.global_batch_size": 48}, 3,
     "moe.moe_shared_expert_intermediate_size (8) must be divisible by "
     "parallel.tensor_parallel_size (3): the shared expert is sharded over tp.\n"
     "  valid tensor_parallel_size: 1, 2, 4, 8"),
    ("dense-ends", {"moe.first_dense_layers": 6, "moe.last_dense_layers": 6}, 1,
     "moe.first_dense_layers (6) + moe.last_dense_layers (6) must be less than the dense model's "
     "num_hidden_layers (12): otherwise the model stays dense.\n  largest sum: 11"),
    ("dense-ends-of-a-list", {"moe.moe_layers": [3], "moe.first_dense_layers": 1}, 1,
     "moe.first_dense_layers (1) and moe.last_dense_layers (0) require moe.moe_layers (all), but "
     "it is a list.\n"
     "  remove the dense layers from the list"),
    ("no-moe-layer", {"moe.moe_layers": []}, 1,
     "moe.moe_layers ([]) must name at least one layer: otherwise the model stays dense.\n"
     "  set moe.moe_layers=all"),
    ("layer-ids", {"moe.moe_layers": [0, 12, 99]}, 1,
     "moe.moe_layers names [12, 99], but the dense model has 12 layers.\n  valid ids: 0 to 11"),
    ("layer-twice", {"moe.moe_layers": [3, 0, 3]}, 1,
     "moe.moe_layers ([0, 3, 3]) names a layer twice.\n  set moe.moe_layers=[0, 3]"),
    ("record-and-replay", {"moe.record_routing": "a", "moe.replay_routing": "b"}, 1,
     "moe.record_routing (a) and moe.replay_routing (b) exclude each other: replayed choices are "
     "recorded already.\n  set only one of them"),
    ("record-checked", {"moe.record_routing": "a", "guard.device_check_interval": 5}, 1,
     "moe.record_routing cannot be combined with guard.device_check_interval (5): a checked step "
     "computes the samples of another rank.\n  leave guard.device_check_interval unset"),
    ("revive-off", {"moe.revive_below_load": 0.5}, 1,
     "moe.revive_below_load (0.5) has no effect without moe.revive_after_steps: no expert is "
     "re-created.\n  set moe.revive_after_steps, or leave moe.revive_below_load unset"),
    ("revive-one", {"moe.revive_after_steps": 9, "moe.moe_router_topk": 1,
     "moe.router_order": "softmax_topk"}, 1,
     "moe.revive_after_steps (9) needs moe.moe_router_topk (1) to be at least 2: a re-created "
     "expert ranks below the one that it copies, and would get no token.\n"
     "  leave moe.revive_after_steps unset"),
    ("revive-all", {"moe.revive_after_steps": 9, "moe.moe_router_topk": 8}, 1,
     "moe.revive_after_steps (9) needs moe.moe_router_topk (8) to be less than "
     "moe.num_moe_experts: every expert gets all tokens, so none is dead.\n"
     "  leave moe.revive_after_steps unset"),
    ("revive-frozen", {"moe.revive_after_steps": 9,
     "train.stages": [{"steps": 2, "freeze": ["experts@1-2", "norms"]}, {"freeze": ["router"]}]}, 1,
     "moe.revive_after_steps (9) cannot be combined with frozen experts@1-2, router (train.freeze "
     "or train.stages): re-creating an expert changes its weights and its router row.\n"
     "  do not freeze routers or experts, or leave moe.revive_after_steps unset"),
    ("revive-replay", {"moe.revive_after_steps": 9, "moe.replay_routing": "choices"}, 1,
     "moe.revive_after_steps (9) cannot be combined with moe.replay_routing (choices): tokens go "
     "to the recorded experts, so a re-created one would stay without.\n"
     "  leave moe.revive_after_steps unset"),
    ("revive-teacher", {"moe.revive_after_steps": 9, "teacher.router_weight": 1.0,
     "upcycle.method": "split_random", "moe.moe_ffn_hidden_size": 6}, 1,
     "moe.revive_after_steps (9) cannot be combined with teacher.router_weight (1.0): it compares "
     "each expert with the neurons that the expert was made of, which a re-created one has no "
     "more.\n  set teacher.router_weight=0, or leave moe.revive_after_steps unset"),
    ("adaptive-none", {"moe.adaptive_aux_loss": True, "moe.moe_aux_loss_coeff": 0.0}, 1,
     "moe.adaptive_aux_loss (true) needs a load-balancing loss: moe.moe_router_load_balancing_type "
     "is aux_loss and moe.moe_aux_loss_coeff, the upper bound of the coefficients, is 0.0.\n"
     "  set both, or leave moe.adaptive_aux_loss unset"),
    ("adaptive-off", {"moe.aux_loss_decay": 0.5}, 1,
     "moe.aux_loss_decay (0.5) has no effect without moe.adaptive_aux_loss: the coefficient is "
     "constant.\n"
     "  set moe.adaptive_aux_loss=true, or leave moe.aux_loss_decay unset"),
]  # fmt: skip
