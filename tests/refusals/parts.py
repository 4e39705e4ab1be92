"""Refused settings of parts of a model that are frozen, scaled or adapted."""

from legal_runs import parallel

# Rule, changes to a legal configuration, world size, complete message.
REFUSALS = [
    ("adapters-unset", {"lora.alpha": 8.0}, 1,
     "lora.alpha (8.0) has no effect without lora.rank.\n"
     "  set lora.rank, or leave lora.alpha unset"),
    ("adapters-none", {"lora.rank": 8, "lora.targets": []}, 1,
     "lora.rank (8) needs lora.targets (none) to name each role once, and at least one.\n"
     "  set lora.targets=[attention]"),
    ("adapters-twice", {"lora.rank": 8, "lora.targets": ["attention", "attention"]}, 1,
     "lora.rank (8) needs lora.targets (attention, attention) to name each role once, and at least "
     "one.\n  set lora.targets=[attention]"),
    ("adapters-rank", {"lora.rank": 49}, 1,
     "lora.rank (49) must be at most hidden_size (48): an update of a weight has no larger rank.\n"
     "  largest lora.rank: 48"),
    ("adapters-multipliers",
     {"lora.rank": 8, "optimizer.lr_multipliers": {"attention@0-1": 2.0}}, 1,
     "optimizer.lr_multipliers names attention@0-1, but with lora.rank (8) its weights are frozen: "
     "adapters are trained in their place.\n"
     "  name adapters in optimizer.lr_multipliers instead"),
    ("adapters-experts-engine", {"lora.rank": 8, "lora.targets": ["experts"]}, 1,
     "lora.targets (experts) needs run.engine (auto) to be torch: Transformer Engine multiplies "
     "all experts at once, and has no place for their adapters.\n"
     "  set run.engine=torch, or lora.targets=[attention]"),
    ("adapters-experts-etp",
     {"lora.rank": 8, "lora.targets": ["experts"], "run.engine": "torch"} | parallel(etp=2), 2,
     "lora.targets (experts) needs parallel.expert_tensor_parallel_size (2) to be 1: adapters of "
     "experts are not sharded.\n"
     "  set parallel.expert_tensor_parallel_size=1, or lora.targets=[attention]"),
    ("adapters-muon", {"lora.rank": 8, "optimizer.optimizer": "muon"}, 1,
     "lora.rank (8) cannot be combined with optimizer.optimizer (muon): Muon orthogonalizes the "
     "update of a weight, which is not that of its two factors.\n"
     "  leave optimizer.optimizer unset, or lora.rank"),
    ("adapters-fp8", {"lora.rank": 8, "train.fp8": "hybrid"}, 1,
     "lora.rank (8) cannot be combined with train.fp8 (hybrid): the adapters' products would stay "
     "in bf16.\n  leave train.fp8 unset, or lora.rank"),
    ("adapters-overlap",
     {"lora.rank": 8, "train.tp_comm_overlap": True} | parallel(tp=2), 2,
     "lora.rank (8) cannot be combined with train.tp_comm_overlap (true): its buffers are for "
     "projections that contain their norm.\n"
     "  leave train.tp_comm_overlap unset, or lora.rank"),
    ("adapters-revived",
     {"lora.rank": 8, "lora.targets": ["experts"], "run.engine": "torch",
      "moe.revive_after_steps": 9}, 1,
     "lora.rank (8) cannot be combined with moe.revive_after_steps (9): a copy of an expert's "
     "frozen weights is not the expert without its adapters.\n"
     "  leave moe.revive_after_steps unset, or lora.rank"),
    ("adapters-frozen", {"train.freeze": ["adapters"]}, 1,
     "train.freeze names adapters, but this model has no such parameters.\n"
     "  its roles: router, experts, attention, norms, embeddings"),
    ("adapters-nothing", {"lora.rank": 8, "train.freeze":
        ["router", "experts", "adapters", "norms", "embeddings"]}, 1,
     "train.freeze (router, experts, adapters, norms, embeddings) freezes all parameters: nothing "
     "is left to train.\n  leave out at least one role"),
    ("freeze-absent", {"train.freeze": ["dense_ffn"]}, 1,
     "train.freeze names dense_ffn, but this model has no such parameters.\n"
     "  its roles: router, experts, attention, norms, embeddings"),
    ("multiplier-absent", {"optimizer.lr_multipliers": {"shared_experts": 2.0}}, 1,
     "optimizer.lr_multipliers names shared_experts, but this model has no such parameters.\n"
     "  its roles: router, experts, attention, norms, embeddings"),
    ("freeze-all", {"train.freeze": ["router", "experts", "attention", "norms", "embeddings"]}, 1,
     "train.freeze (router, experts, attention, norms, embeddings) freezes all parameters: nothing "
     "is left to train.\n  leave out at least one role"),
    ("freeze-absent-layer", {"train.freeze": ["experts@0-99", "embeddings@0"]}, 1,
     "train.freeze names experts@0-99, embeddings@0, but this model has no such parameters.\n"
     "  its roles: router, experts, attention, norms, embeddings; layers 0 to 11"),
    ("multiplier-twice", {"optimizer.lr_multipliers": {"attention": 2.0, "attention@1-3": 3.0}}, 1,
     "optimizer.lr_multipliers names attention and attention@1-3, which have parameters in common."
     "\n  name each layer of a role once"),
    ("freeze-all-by-layer",
     {"train.freeze": ["router@0-11", "experts@0-11", "attention@0-11", "norms", "embeddings"]}, 1,
     "train.freeze (router@0-11, experts@0-11, attention@0-11, norms, embeddings) freezes all "
     "parameters: nothing is left to train.\n  leave out at least one role"),
    ("decay-norms", {"optimizer.weight_decay_multipliers": {"norms": 1.0}}, 1,
     "optimizer.weight_decay_multipliers names norms, which have no weight decay.\n"
     "  remove norms from optimizer.weight_decay_multipliers"),
    ("freeze-twice", {"train.freeze": ["router"], "train.stages": [{}]}, 1,
     "train.freeze (router) and train.stages both say what is frozen: a stage has its own list.\n"
     "  remove train.freeze, or add its roles to each stage"),
    ("stage-without-end", {"train.stages": [{}, {}]}, 1,
     "train.stages.0.steps (None) must be set: each stage has a length but the last, which takes "
     "the rest of train.steps.\n  set it to a number of steps"),
    ("stage-with-end", {"train.stages": [{"steps": 3}]}, 1,
     "train.stages.0.steps (3) must be unset: each stage has a length but the last, which takes "
     "the rest of train.steps.\n  remove it, or add a stage"),
    ("stage-never", {"train.stages": [{"steps": 10}, {}]}, 1,
     "train.stages before the last have 10 steps, which must be fewer than train.steps (10): "
     "otherwise the last stage never begins.\n  smallest train.steps: 11"),
]  # fmt: skip
