"""Refused settings of steps, optimizers, data and teachers."""

from legal_runs import domains

ADAPTIVE = {"update": "doremi", "reference_losses": "losses.json"}
HELD_OUT = {"data.validation_fraction": 0.1}

# Rule, changes to a legal configuration, world size, complete message.
REFUSALS = [
    ("min-lr", {"optimizer.min_lr": 1e-3}, 1,
     "optimizer.min_lr (0.001) must be at most optimizer.lr (3e-05): the schedule decays from lr "
     "to min_lr.\n  largest optimizer.min_lr: 3e-05"),
    ("no-text", {"data.path": None}, 1,
     "exactly one of data.path and data.domains must be set.\n"
     "  set data.path for one text, or data.domains for several named texts with weights"),
    ("two-ways-to-hold-out", {"data.validation_path": "v", "data.validation_fraction": 0.1}, 1,
     "data.validation_fraction (0.1) and a validation_path are two ways to hold out text.\n"
     "  set only one of them"),
    ("validation-of-domains", domains(a=1) | {"data.validation_path": "v"}, 1,
     "data.validation_path requires data.path.\n"
     "  set data.domains.NAME.validation_path, or data.validation_fraction"),
    ("weight-0", domains(a=0, b=1), 1,
     "weight of domain 'a' (0.0) must be positive\n"
     "  remove domains that should not be sampled"),
    ("no-weight", domains(a=None, b=1), 1,
     "data.domains.a must have a weight: data.mixing.weights is given"),
    ("sum", domains(a=3, b=1), 1,
     "weights of the domains sum to 4, and must sum to 1: they are shares of samples.\n"
     "  with these proportions: a: 0.75, b: 0.25"),
    ("missing-domain", domains(a=None) | {"data.mixing": {"weights": "llama"}}, 1,
     "mixture 'llama' is for the domains commoncrawl, c4, github, wikipedia, books, arxiv, "
     "stackexchange: missing ['arxiv', 'books', 'c4', 'commoncrawl', 'github', 'stackexchange', "
     "'wikipedia'], without a weight ['a'].\n"
     "  rename the domains, or set data.domains.*.weight"),
    ("two-weights", domains(a=1) | {"data.mixing": {"weights": "llama"}}, 1,
     "data.domains.a.weight is set, but data.mixing.weights is llama, which brings its own.\n"
     "  leave out one of the two"),
    ("one-text-moves", {"data.mixing": ADAPTIVE}, 1,
     "data.mixing.update (doremi) needs data.domains: one text has no weights to adapt"),
    ("no-reference", domains(a=1) | HELD_OUT | {"data.mixing": {"update": "doremi"}}, 1,
     "data.mixing.update (doremi) needs data.mixing.reference_losses: weights follow the losses "
     "in excess of them.\n"
     "  run megatron-moe reference-loss CONFIG.yaml --out FILE"),
    ("not-judged", domains(a=1) | {"data.mixing": ADAPTIVE}, 1,
     "data.mixing.update (doremi) needs held-out text of each domain.\n"
     "  set data.validation_fraction, or data.domains.NAME.validation_path for all"),
    ("interval", domains(a=1) | HELD_OUT | {"data.mixing": {**ADAPTIVE, "interval": 2303}}, 1,
     "data.mixing.interval (2303 tokens) must be at least the tokens of a step, "
     "train.global_batch_size * data.seq_length = 2304: weights change only between steps.\n"
     "  smallest data.mixing.interval: 2304"),
    ("recompute-engine", {"train.recompute": "selective", "run.engine": "torch"}, 1,
     "train.recompute (selective) on CUDA needs run.engine (torch) to be transformer_engine: "
     "Megatron-Core recomputes norms only with its modules, and the torch engine's experts "
     "recompute their activations with any setting.\n  set train.recompute to none, moe or full"),
    ("reset-attention", {"data.reset_attention": True, "train.micro_batch_size": 2}, 1,
     "data.reset_attention (true) with Transformer Engine needs train.micro_batch_size (2) to be "
     "1: it takes packed documents as a single row.\n"
     "  set run.engine=torch, which has no such limit, or use more micro-batches"),
    ("warmup", {"optimizer.warmup_steps": 10}, 1,
     "optimizer.warmup_steps (10) must be less than train.steps (10): otherwise the learning rate "
     "never reaches its peak.\n  largest optimizer.warmup_steps: 9"),
    ("warmup-decay", {"optimizer.lr_decay_steps": 2}, 1,
     "optimizer.warmup_steps (2) must be less than optimizer.lr_decay_steps (2): otherwise the "
     "learning rate never reaches its peak.\n  largest optimizer.warmup_steps: 1"),
    ("warmup-twice", {"optimizer.lr_warmup_fraction": 0.5}, 1,
     "optimizer.warmup_steps (2) and optimizer.lr_warmup_fraction (0.5) are two lengths of the "
     "warm-up.\n  set only one of them"),
    ("warmup-fraction", {"optimizer.warmup_steps": 100, "optimizer.lr_warmup_fraction": 0.99}, 1,
     "optimizer.lr_warmup_fraction (0.99) of train.steps (10) rounds to all of its steps: the "
     "learning rate never reaches its peak.\n  set a smaller optimizer.lr_warmup_fraction"),
    ("inverse-square-root", {"optimizer.lr_decay_style": "inverse-square-root",
                             "optimizer.warmup_steps": 0}, 1,
     "optimizer.lr_decay_style (inverse-square-root) requires a warm-up (optimizer.warmup_steps is "
     "0): the learning rate is lr * sqrt(warm-up steps / step), and would fall to a tenth within "
     "100 steps.\n  set optimizer.warmup_steps, or another optimizer.lr_decay_style"),
    ("wsd-length", {"optimizer.lr_decay_style": "WSD"}, 1,
     "optimizer.lr_decay_style (WSD) requires optimizer.lr_wsd_decay_steps: the length of the "
     "decay at the end.\n  often used: a tenth to a fifth of the run"),
    ("wsd-too-long", {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_steps": 9}, 1,
     "optimizer.lr_wsd_decay_steps (9) must be at most train.steps (10) minus the warm-up (2): the "
     "decay starts after the warm-up.\n  largest optimizer.lr_wsd_decay_steps: 8"),
    ("wsd-steps-alone", {"optimizer.lr_wsd_decay_steps": 2}, 1,
     "optimizer.lr_wsd_decay_steps (2) requires optimizer.lr_decay_style (cosine) to be WSD: no "
     "other style has a decay of its own at the end.\n"
     "  set optimizer.lr_decay_style=WSD, or leave optimizer.lr_wsd_decay_steps unset"),
    ("wsd-style-alone", {"optimizer.lr_wsd_decay_style": "linear"}, 1,
     "optimizer.lr_wsd_decay_style (linear) requires optimizer.lr_decay_style (cosine) to be WSD: "
     "no other style has a decay of its own at the end.\n"
     "  set optimizer.lr_decay_style=WSD, or leave optimizer.lr_wsd_decay_style unset"),
    ("decay-ends", {"optimizer.weight_decay_incr_style": "linear"}, 1,
     "optimizer.weight_decay_incr_style (linear) requires optimizer.start_weight_decay and "
     "optimizer.end_weight_decay, the ends of the increase.\n  set both"),
    ("decay-constant", {"optimizer.end_weight_decay": 0.2}, 1,
     "optimizer.end_weight_decay (0.2) requires optimizer.weight_decay_incr_style (constant) to be "
     "linear or cosine: a constant decay is optimizer.weight_decay.\n"
     "  leave optimizer.end_weight_decay unset, or set optimizer.weight_decay_incr_style"),
    ("decay-falls", {"optimizer.weight_decay_incr_style": "cosine",
     "optimizer.start_weight_decay": 0.2, "optimizer.end_weight_decay": 0.1}, 1,
     "optimizer.start_weight_decay (0.2) must be at most optimizer.end_weight_decay (0.1): "
     "Megatron-Core only increases weight decay.\n"
     "  largest optimizer.start_weight_decay: 0.1"),
    ("gradients", {"train.grad_reduce_in_fp32": False, "train.precision": "fp32"}, 1,
     "train.grad_reduce_in_fp32 (false) requires train.precision (fp32) to be bf16: gradients "
     "otherwise have the dtype of the weights.\n"
     "  set train.precision=bf16, or leave train.grad_reduce_in_fp32 unset"),
    ("muon-momentum", {"optimizer.muon_momentum": 0.9}, 1,
     "optimizer.muon_momentum (0.9) requires optimizer.optimizer (adam) to be muon: AdamW does not "
     "use it.\n  set optimizer.optimizer=muon, or leave optimizer.muon_momentum unset"),
    ("moments-muon", {"optimizer.optimizer": "muon", "optimizer.optimizer_cpu_offload": True}, 1,
     "optimizer.optimizer_cpu_offload (true) requires optimizer.optimizer (muon) to be adam: "
     "Megatron-Core's Muon keeps its momentum in fp32 on the GPU.\n"
     "  set optimizer.optimizer=adam, or leave optimizer.optimizer_cpu_offload unset"),
    ("moments-muon-bf16", {"optimizer.optimizer": "muon", "optimizer.exp_avg_dtype": "bf16"}, 1,
     "optimizer.exp_avg_dtype (bf16) requires optimizer.optimizer (muon) to be adam: "
     "Megatron-Core's Muon keeps its momentum in fp32 on the GPU.\n"
     "  set optimizer.optimizer=adam, or leave optimizer.exp_avg_dtype unset"),
    ("moments-stuck", {"optimizer.exp_avg_sq_dtype": "bf16", "optimizer.adam_beta2": 0.999}, 1,
     "optimizer.exp_avg_sq_dtype (bf16) requires optimizer.adam_beta2 (0.999) to be at most "
     "1 - 2^-8 = 0.99609375: bf16 has 8 bits, so a mean that decays by less in a step is rounded "
     "back and never falls.\n"
     "  set optimizer.exp_avg_sq_dtype=fp32, or optimizer.adam_beta2=0.99"),
    ("local-copies-too-rare",
     {"checkpoint.local_dir": "/scratch", "checkpoint.interval": 50}, 1,
     "checkpoint.local_interval (100) must be at most checkpoint.interval (50): a local copy is "
     "used only if it is not older than the newest checkpoint.\n"
     "  largest checkpoint.local_interval: 50"),
    ("device-check-never", {"guard.device_check_interval": 11}, 1,
     "guard.device_check_interval (11) must be at most train.steps (10): no step would be computed "
     "twice.\n  largest guard.device_check_interval: 10, or leave it unset"),
    ("teacher-without-a-weight", {"teacher.steps": 5}, 1,
     "teacher.steps (5) has no effect without a weight: there is no teacher.\n"
     "  set teacher.logits_weight, for example to 1, or remove the section teacher"),
    ("another-teacher-of-layers", {"teacher.layers_weight": 0.5, "teacher.path": "larger"}, 1,
     "teacher.layers_weight (0.5) needs the source as the teacher, but teacher.path is larger: MoE "
     "layers are compared with the FFNs that they were made of.\n"
     "  leave teacher.path unset, or set teacher.layers_weight=0 and teacher.logits_weight"),
    ("teacher-of-routers-to-copies", {"teacher.router_weight": 0.5}, 1,
     "teacher.router_weight (0.5) needs experts that are different parts of the dense FFN, but "
     "upcycle.method (copy) gives them the same neurons: there is nothing to prefer.\n"
     "  set upcycle.method to one of split_random, split_clustered, split_coactivation, "
     "split_routed, sharing_inner, sharing_inter, weaver, or set teacher.router_weight=0"),
    ("teacher-of-sigmoid-routers", {
        "teacher.router_weight": 0.5, "upcycle.method": "split_random",
        "moe.moe_ffn_hidden_size": 6, "moe.moe_router_score_function": "sigmoid"}, 1,
     "teacher.router_weight (0.5) needs moe.moe_router_score_function (sigmoid) to be softmax: the "
     "shares of the experts in the dense output are a distribution.\n"
     "  set teacher.router_weight=0, or moe.moe_router_score_function=softmax"),
]  # fmt: skip
