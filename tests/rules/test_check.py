"""Test that each rule's message has both values, the reason and a way out that satisfies it."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec, spec_from_config
from megatron_moe.parallel.layout import fold, local_experts
from megatron_moe.rules.check import RULES, Case, check, legal_layout, violations

LAYERS, HEADS, GROUPS, FFN, MAX_LENGTH = 12, 12, 6, 48, 256


def make_spec(**changes: Any) -> ModelSpec:
    dense = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": 48,
        "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "vocab_size": 100, "max_position_embeddings": MAX_LENGTH,
    }  # fmt: skip
    return spec_from_config(dense | changes)


def make_config(changes: dict[str, Any] | None = None) -> RunConfig:
    """Return a legal configuration for one rank, with changes by ``section.key``."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "run"},
        "source": {"path": "dense"},
        "moe": {"num_moe_experts": 8},
        "parallel": {},
        "upcycle": {},
        "data": {"path": "text", "seq_length": 48},
        "train": {"steps": 10, "global_batch_size": 48},
        "optimizer": {"warmup_steps": 2},
        "guard": {},
        "checkpoint": {},
        "teacher": {},
    }
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        tree[section][key] = value
    return build(RunConfig, tree)


def parallel(**degrees: int) -> dict[str, int]:
    """Return settings for tp, cp, pp, vpp, ep and etp."""
    names = {
        "tp": "tensor", "cp": "context", "pp": "pipeline", "vpp": "virtual_pipeline",
        "ep": "expert", "etp": "expert_tensor",
    }  # fmt: skip
    return {f"parallel.{names[short]}_parallel_size": size for short, size in degrees.items()}


def domains(**weights: float | None) -> dict[str, Any]:
    """Return settings for named domains instead of one text."""
    named = {name: {"path": name, "weight": weight} for name, weight in weights.items()}
    return {"data.path": None, "data.domains": named}


ADAPTIVE = {"update": "doremi", "reference_losses": "losses.json"}
HELD_OUT = {"data.validation_fraction": 0.1}

SHARED_OVERLAP = {
    "moe.moe_shared_expert_overlap": True, "moe.moe_ffn_hidden_size": 4,
    "moe.moe_shared_expert_intermediate_size": 16, "upcycle.method": "split_random",
}  # fmt: skip

# Rule, changes to a legal configuration, world size, complete message.
REFUSALS = [
    ("dp", parallel(tp=2, cp=2), 6,
     "world_size (6) must be divisible by pp * cp * tp = 1 * 2 * 2 = 4: dp is the quotient.\n"
     "  nearest world_size: 4, 8"),
    ("edp", parallel(ep=4) | {"train.global_batch_size": 6}, 6,
     "world_size (6) must be divisible by pp * ep * etp = 1 * 4 * 1 = 4: edp is the quotient.\n"
     "  nearest world_size: 4, 8"),
    ("edp-too-few", parallel(ep=8), 4,
     "world_size (4) must be divisible by pp * ep * etp = 1 * 8 * 1 = 8: edp is the quotient.\n"
     "  nearest world_size: 8"),
    ("heads", parallel(tp=4), 4,
     "parallel.tensor_parallel_size (4) must divide num_attention_heads of the dense model (12), "
     "and divide num_key_value_heads (6) or be a multiple of it, and divide the rows of the fused "
     "projection (96): a tp rank holds whole query groups, or equally many ranks share each "
     "group.\n"
     "  valid tensor_parallel_size: 1, 2, 3, 6, 12"),
    ("experts", parallel(ep=3), 3,
     "moe.num_moe_experts (8) must be divisible by parallel.expert_parallel_size (3): each ep rank "
     "holds whole experts.\n  valid expert_parallel_size: 1, 2, 4, 8"),
    ("expert-neurons", parallel(etp=5) | {"train.global_batch_size": 5}, 5,
     "moe.moe_ffn_hidden_size (48) must be divisible by parallel.expert_tensor_parallel_size "
     "(5): every etp rank must hold an equal share of an expert's neurons.\n"
     "  valid expert_tensor_parallel_size: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
    ("topk", {"moe.moe_router_topk": 9}, 1,
     "moe.moe_router_topk (9) must be at most moe.num_moe_experts (8): a token is routed to "
     "distinct experts.\n"
     "  largest moe.moe_router_topk: 8"),
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
    ("tp-overlap", {"train.tp_comm_overlap": True}, 1,
     "train.tp_comm_overlap (true) needs parallel.tensor_parallel_size (1) to be at least 2: there "
     "is no communication to overlap.\n  leave train.tp_comm_overlap unset"),
    ("tp-overlap-engine", parallel(tp=3) | {"train.tp_comm_overlap": True, "run.engine": "torch",
     "train.global_batch_size": 3}, 3,
     "train.tp_comm_overlap (true) needs run.engine to be transformer_engine: only its linear "
     "layers overlap communication with matrix products.\n"
     "  leave train.tp_comm_overlap unset"),
    ("sigmoid-order", {"moe.moe_router_score_function": "sigmoid",
     "moe.router_order": "softmax_topk"}, 1,
     "moe.router_order (softmax_topk) has no effect with moe.moe_router_score_function "
     "(sigmoid): the scores of chosen experts are divided by their sum.\n"
     "  leave moe.router_order unset"),
    ("top1", {"moe.moe_router_topk": 1}, 1,
     "moe.moe_router_topk (1) with moe.router_order (topk_softmax) is not trainable: the softmax "
     "over one chosen expert is always 1, so the router gets no gradient.\n"
     "  set moe.router_order=softmax_topk or moe.moe_router_topk=2"),
    ("copy", {"moe.moe_ffn_hidden_size": 24}, 1,
     "moe.moe_ffn_hidden_size (24) must equal the dense model's intermediate_size (48) with "
     "upcycle.method (copy): each expert is the whole dense FFN.\n"
     "  leave moe.moe_ffn_hidden_size unset"),
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
    ("vpp-alone", parallel(vpp=2), 1,
     "parallel.virtual_pipeline_parallel_size (2) needs parallel.pipeline_parallel_size of at "
     "least 2: chunks are interleaved between stages.\n"
     "  leave parallel.virtual_pipeline_parallel_size unset"),
    ("layers", parallel(pp=2, vpp=4), 2,
     "num_hidden_layers of the dense model (12) must be divisible by pp * vpp = 2 * 4 = 8: every "
     "chunk must hold the same number of layers.\n"
     "  nearest pp x vpp: 2x3, 3x2, 6x1, 2x2\n"
     "  or set parallel.num_layers_in_first_pipeline_stage=4 "
     "parallel.num_layers_in_last_pipeline_stage=8"),
    ("uneven", parallel(pp=4) | {"parallel.num_layers_in_first_pipeline_stage": 2}, 4,
     "parallel.num_layers_in_first_pipeline_stage (2) and "
     "num_layers_in_last_pipeline_stage (unset) must leave equal numbers of the 12 layers to all "
     "other stages (pp = 4), and vpp = 1 must divide the layers of every stage.\n"
     "  parallel.num_layers_in_first_pipeline_stage=3 "
     "parallel.num_layers_in_last_pipeline_stage=3"),
    ("record-and-replay", {"moe.record_routing": "a", "moe.replay_routing": "b"}, 1,
     "moe.record_routing (a) and moe.replay_routing (b) exclude each other: replayed choices are "
     "recorded already.\n  set only one of them"),
    ("record-checked", {"moe.record_routing": "a", "guard.device_check_interval": 5}, 1,
     "moe.record_routing cannot be combined with guard.device_check_interval (5): a checked step "
     "computes the samples of another rank.\n  leave guard.device_check_interval unset"),
    ("adaptive-none", {"moe.adaptive_aux_loss": True, "moe.moe_aux_loss_coeff": 0.0}, 1,
     "moe.adaptive_aux_loss (true) needs a load-balancing loss: moe.moe_router_load_balancing_type "
     "is aux_loss and moe.moe_aux_loss_coeff, the upper bound of the coefficients, is 0.0.\n"
     "  set both, or leave moe.adaptive_aux_loss unset"),
    ("adaptive-off", {"moe.aux_loss_decay": 0.5}, 1,
     "moe.aux_loss_decay (0.5) has no effect without moe.adaptive_aux_loss: the coefficient is "
     "constant.\n"
     "  set moe.adaptive_aux_loss=true, or leave moe.aux_loss_decay unset"),
    ("layout-chunks", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*6|t*3|t*3L"},
     2, "parallel.pipeline_model_parallel_layout (Et*6|t*3|t*3L) has 3 chunks, which must be "
     "pp * vpp = 2 * 1 = 2, with pp of at least 2: each rank of the pipeline holds vpp of them.\n"
     "  for example parallel.pipeline_parallel_size=2 "
     "parallel.pipeline_model_parallel_layout='Et*6|t*6L'"),
    ("layout-layers", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*6|t*5L"}, 2,
     "parallel.pipeline_model_parallel_layout (Et*6|t*5L) must have E first, then a t for each of "
     "the 12 layers, and L last: it is Etttttt|tttttL, with 11 layers.\n"
     "  for example parallel.pipeline_parallel_size=2 "
     "parallel.pipeline_model_parallel_layout='Et*6|t*6L'"),
    ("layout-letters", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*12m|L"}, 2,
     "parallel.pipeline_model_parallel_layout (Et*12m|L) must have E first, then a t for each of "
     "the 12 layers, and L last: it is Ettttttttttttm|L, with 12 layers.\n"
     "  for example parallel.pipeline_parallel_size=2 "
     "parallel.pipeline_model_parallel_layout='Et*6|t*6L'"),
    ("layout-empty", parallel(pp=3) | {"parallel.pipeline_model_parallel_layout": "Et*12||L"}, 3,
     "parallel.pipeline_model_parallel_layout (Et*12||L) has a chunk without anything: its rank "
     "would have no parameters.\n"
     "  for example parallel.pipeline_parallel_size=3 "
     "parallel.pipeline_model_parallel_layout='Et*4|t*4|t*4L'"),
    ("layout-endless", parallel(pp=2)
     | {"parallel.pipeline_model_parallel_layout": "Et*9999999999|L"}, 2,
     "parallel.pipeline_model_parallel_layout (Et*9999999999|L) is no layout: a layout may repeat "
     "a part 1000 times, not 9999999999 times"),
    ("layout-twice", parallel(pp=2) | {"parallel.pipeline_model_parallel_layout": "Et*8|t*4L",
                                       "parallel.num_layers_in_last_pipeline_stage": 4}, 2,
     "parallel.pipeline_model_parallel_layout (Et*8|t*4L) and "
     "parallel.num_layers_in_last_pipeline_stage (4) both say how many layers a stage has.\n"
     "  remove one of them"),
    ("sequence", parallel(tp=2) | {"data.seq_length": 47}, 2,
     "data.seq_length (47) must be divisible by tp = 2: the sequence is sharded over these "
     "ranks.\n"
     "  nearest data.seq_length: 46, 48"),
    ("sequence-zigzag", parallel(tp=2, cp=2) | {"data.seq_length": 50}, 4,
     "data.seq_length (50) must be divisible by 2 * cp * tp = 8: the sequence is sharded over "
     "these ranks.\n"
     "  nearest data.seq_length: 48, 56"),
    ("too-long", {"data.seq_length": 257}, 1,
     "data.seq_length (257) must be at most the dense model's max_position_embeddings (256): it "
     "was not trained on later positions.\n"
     "  largest data.seq_length: 256"),
    ("batch", {"train.global_batch_size": 10, "train.micro_batch_size": 2}, 4,
     "train.global_batch_size (10) must be divisible by train.micro_batch_size * dp = 2 * 4 = 8: "
     "every replica processes whole micro-batches.\n"
     "  nearest train.global_batch_size: 8, 16"),
    ("batch-vpp", parallel(pp=2, vpp=2) | {"train.global_batch_size": 3}, 2,
     "micro-batches of a step (train.global_batch_size / (micro_batch_size * dp) = 3) must be "
     "divisible by parallel.pipeline_parallel_size (2) with virtual_pipeline_parallel_size: the "
     "interleaved schedule runs them in rounds.\n  nearest train.global_batch_size: 2, 4"),
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
    ("ramp-parts", {"train.rampup_batch_size": {"start": 8, "increment": 12, "samples": 99}}, 1,
     "train.global_batch_size (48) minus train.rampup_batch_size.start (8) must be a multiple of "
     "train.rampup_batch_size.increment (12): the batch grows by increments.\n"
     "  set train.rampup_batch_size.increment to a divisor of the difference"),
    ("ramp-replicas", {"train.rampup_batch_size": {"start": 8, "increment": 5, "samples": 99}}, 4,
     "train.rampup_batch_size.increment (5) must be divisible by train.micro_batch_size * dp (* pp "
     "if chunks are interleaved) = 4: every batch of the ramp consists of whole micro-batches of "
     "each replica.\n  nearest train.rampup_batch_size.increment: 4, 8"),
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
     "sharing_inner, sharing_inter, weaver, or set teacher.router_weight=0"),
    ("teacher-of-sigmoid-routers", {
        "teacher.router_weight": 0.5, "upcycle.method": "split_random",
        "moe.moe_ffn_hidden_size": 6, "moe.moe_router_score_function": "sigmoid"}, 1,
     "teacher.router_weight (0.5) needs moe.moe_router_score_function (sigmoid) to be softmax: the "
     "shares of the experts in the dense output are a distribution.\n"
     "  set teacher.router_weight=0, or moe.moe_router_score_function=softmax"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "world_size", "message"), [pytest.param(*r[1:], id=r[0]) for r in REFUSALS]
)
def test_a_message_has_setting_rule_reason_and_way_out(changes, world_size: int, message: str):
    assert violations(make_config(), make_spec(), 1) == [], "the unchanged configuration is legal"
    assert violations(make_config(changes), make_spec(), world_size) == [message]


def test_layers_that_stay_dense_are_sharded_over_tp():
    spec = make_spec(intermediate_size=50)
    changes = parallel(tp=3) | {"moe.moe_layers": [0, 1]}
    assert violations(make_config(changes), spec, 3) == [
        "intermediate_size of the dense model (50) must be divisible by "
        "parallel.tensor_parallel_size (3): the layers that stay dense are sharded over tp.\n"
        "  valid tensor_parallel_size: 1, 2, 5, 10, 25, 50"
    ]
    assert violations(make_config(changes | {"moe.moe_layers": "all"}), spec, 3) == []


def test_every_rule_is_tested_here():
    spec = make_spec(intermediate_size=50)
    dense = (parallel(tp=3) | {"moe.moe_layers": [0]}, 3)
    violated = set()
    for changes, world_size in [*((r[1], r[2]) for r in REFUSALS), dense]:
        case = Case(make_config(changes), spec, world_size)
        violated |= {rule for rule in RULES if list(rule(case))}
    windows = Case(make_config(), replace(spec, attention_windows=(4, None)), 1)
    violated |= {rule for rule in RULES if list(rule(windows))}
    assert violated == set(RULES)


def test_all_violations_come_in_one_error():
    changes = parallel(tp=4, ep=3, cp=2) | {
        "moe.moe_router_topk": 9, "data.seq_length": 50, "optimizer.min_lr": 1.0,
    }  # fmt: skip
    messages = violations(make_config(changes), make_spec(), 7)
    assert len(messages) == 7
    with pytest.raises(ConfigError) as caught:
        check(make_config(changes), make_spec(), 7)
    suggestion = "  no layout of 7 ranks is legal with the other settings"
    assert str(caught.value) == "\n".join([*messages, suggestion])
    for setting in (
        "pp * cp * tp", "pp * ep * etp", "num_key_value_heads", "num_moe_experts",
        "moe_router_topk", "seq_length", "min_lr",
    ):  # fmt: skip
        assert sum(setting in message for message in messages) >= 1, setting


@pytest.mark.parametrize(
    "changes",
    [
        parallel(vpp=1),
        {"moe.moe_router_topk": 1, "moe.router_order": "softmax_topk"},
        {"moe.moe_router_topk": 8},
        {"train.steps": 0},
        {"optimizer.warmup_steps": 0},
        {"data.seq_length": 256},
        {"moe.moe_ffn_hidden_size": FFN},
        {"moe.moe_layers": [11]},
        {"optimizer.min_lr": 3e-5},
        {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_steps": 8},
        {"optimizer.lr_decay_steps": 3},
        {"train.stages": [{"steps": 9, "freeze": ["experts"]}, {}]},
        {"train.freeze": ["router"], "optimizer.lr_multipliers": {"experts": 2.0}},
        {"train.freeze": ["router@11"]},
        {"optimizer.exp_avg_sq_dtype": "bf16", "optimizer.adam_beta2": 0.99609375},
        {"optimizer.exp_avg_dtype": "bf16", "optimizer.adam_beta2": 0.999},
        {"optimizer.lr_multipliers": {"experts@0-5": 2.0, "experts@6-11": 3.0}},
        {"train.freeze": ["router", "experts", "attention", "embeddings", "norms@0-11"]},
        {"optimizer.warmup_steps": 100, "optimizer.lr_warmup_fraction": 0.9},
    ],
    ids=lambda changes: ",".join(f"{k.split('.')[1]}={v}" for k, v in changes.items()),
)
def test_the_edge_of_a_rule_is_legal(changes: dict[str, Any]):
    check(make_config(changes), make_spec(), 1)


SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8])
RANDOM = st.fixed_dictionaries(
    {
        "parallel.tensor_parallel_size": SIZES,
        "parallel.context_parallel_size": SIZES,
        "parallel.pipeline_parallel_size": SIZES,
        "parallel.virtual_pipeline_parallel_size": st.none() | SIZES,
        "parallel.expert_parallel_size": SIZES,
        "parallel.expert_tensor_parallel_size": SIZES,
        "moe.num_moe_experts": st.integers(1, 16),
        "moe.moe_layers": st.just("all") | st.just([0, 5]),
        "data.seq_length": st.sampled_from([32, 48, 96, 100, 240]),
        "train.global_batch_size": st.integers(1, 64),
        "train.micro_batch_size": st.integers(1, 3),
    }
)


def worlds_of(changes: dict[str, Any]) -> list[int]:
    """Return world sizes that are legal for the layout, and some others."""
    tp, cp, pp, ep, etp = (
        changes[f"parallel.{name}_parallel_size"]
        for name in ("tensor", "context", "pipeline", "expert", "expert_tensor")
    )
    return sorted({pp * tp * cp, pp * ep * etp, pp * tp * cp * ep * etp, 24, 7})


@given(changes=RANDOM, data=st.data())
@settings(max_examples=300, deadline=None)
def test_accepted_configurations_divide_and_fold(changes: dict[str, Any], data: st.DataObject):
    world_size = data.draw(st.sampled_from(worlds_of(changes)))
    config, spec = make_config(changes), make_spec()
    if violations(config, spec, world_size):
        return
    assert_runs(config, spec, world_size)


LEGAL_DEGREES = [
    pytest.param(tp, cp, pp, vpp, ep, etp, id=f"tp{tp}-cp{cp}-pp{pp}-vpp{vpp}-ep{ep}-etp{etp}")
    for tp, cp, pp, vpp, ep, etp in itertools.product(
        (1, 3), (1, 2), (1, 2), (1, 3), (1, 4), (1, 3)
    )
    if pp > 1 or vpp == 1
]


@pytest.mark.parametrize(("tp", "cp", "pp", "vpp", "ep", "etp"), LEGAL_DEGREES)
def test_degrees_that_divide_are_accepted(tp, cp, pp, vpp, ep, etp):
    """Check that no rule is too strict: all these degrees divide 144 and can run."""
    degrees = parallel(tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp)
    config = make_config(degrees | {"train.global_batch_size": 144 * 2})
    check(config, make_spec(), 144)
    assert_runs(config, make_spec(), 144)


def assert_runs(config: RunConfig, spec: ModelSpec, world_size: int) -> None:
    """Assert that everything that is sharded is divided evenly."""
    layout = fold(config.parallel, world_size=world_size)
    vpp = config.parallel.virtual_pipeline_parallel_size or 1
    pp, dp, cp, tp = layout.attention.shape
    experts = [
        local_experts(layout, rank=rank, num_experts=config.moe.num_moe_experts)
        for rank in layout.experts.groups("ep")[0]
    ]
    assert [e for run in experts for e in run] == list(range(config.moe.num_moe_experts))
    assert spec.num_query_groups % tp == 0
    assert spec.num_attention_heads % tp == 0
    assert spec.ffn_hidden_size % layout.experts.size("etp") == 0
    assert spec.num_layers % (pp * vpp) == 0
    assert config.data.seq_length % cp == 0
    assert config.data.seq_length // cp % (tp * (2 if cp > 1 else 1)) == 0
    micro_batches, rest = divmod(config.train.global_batch_size, dp * config.train.micro_batch_size)
    assert rest == 0
    assert micro_batches >= 1
    assert vpp == 1 or micro_batches % pp == 0


@given(changes=RANDOM, data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_suggested_value_satisfies_the_rule(changes: dict[str, Any], data: st.DataObject):
    world_size = data.draw(st.sampled_from(worlds_of(changes)))
    for message in violations(make_config(changes), make_spec(), world_size):
        suggestions = list(suggested(message))
        assert "\n  " in message, "every message ends with a way out"
        for setting in suggestions:
            world = setting.pop("world_size", world_size)
            left = violations(make_config(changes | setting), make_spec(), world)
            assert rule_of(message) not in map(rule_of, left), (message, setting)


def rule_of(message: str) -> str:
    """Return the message without its numbers, which another value would change."""
    return re.sub(r"[\d.]+", "#", message.splitlines()[0].replace("2 * cp * tp", "tp"))


def suggested(message: str):
    """Yield each value of the indented line as a change of settings."""
    lines = r"\n  (?:valid|nearest|largest|smallest) ([\w. ]+): (.*)"
    if ends := re.findall(r"(parallel\.num_layers_in_\w+)=(\d+)", message):
        yield {name: int(value) for name, value in ends}
    for name, values in re.findall(lines, message):
        for value in values.split(", "):
            if name == "pp x vpp":
                pp, vpp = map(int, value.split("x"))
                yield parallel(pp=pp, vpp=vpp)
            else:
                full = f"parallel.{name}" if name.endswith("parallel_size") else name
                yield {full: int(value)}


@given(changes=RANDOM, data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_nearest_legal_layout_is_legal_and_no_nearer_one_is(
    changes: dict[str, Any], data: st.DataObject
):
    """Compare with an exhaustive search over all degrees up to the world size."""
    world_size = data.draw(st.sampled_from([w for w in worlds_of(changes) if w <= 24]))
    config, spec = make_config(changes), make_spec()
    suggestion = legal_layout(config, spec, world_size)
    legal = [
        degrees
        for degrees in itertools.product(*[divisors(world_size)] * 3, range(1, 13),
                                         *[divisors(world_size)] * 2)
        if is_legal_layout(changes, degrees, world_size)
    ]  # fmt: skip
    current = tuple(changes[name] or 1 for name in DEGREES)
    if current in legal:
        assert suggestion == []
    elif not legal:
        assert suggestion == [f"  no layout of {world_size} ranks is legal with the other settings"]
    else:
        assert suggestion[0].startswith(f"  nearest legal layout of {world_size} ranks: parallel.")
        changed = re.findall(r"(parallel\.\w+)=(\d+)", suggestion[0])
        nearest = tuple(int(dict(changed).get(name, changes[name] or 1)) for name in DEGREES)
        assert nearest in legal
        least = min(distance(degrees, current) for degrees in legal)
        assert distance(nearest, current) == pytest.approx(least)


DEGREES = [f"parallel.{name}_parallel_size" for name in (
    "tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")]  # fmt: skip


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def is_legal_layout(changes: dict[str, Any], degrees: tuple[int, ...], world_size: int) -> bool:
    """Return whether a layout is legal, by an independent one-line version of each rule."""
    tp, cp, pp, vpp, ep, etp = degrees
    length, batch = changes["data.seq_length"], changes["train.global_batch_size"]
    if world_size % (tp * cp * pp) or world_size % (pp * ep * etp):
        return False
    micro, rest = divmod(batch, changes["train.micro_batch_size"] * (world_size // (tp * cp * pp)))
    return not (
        rest
        or GROUPS % tp
        or changes["moe.num_moe_experts"] % ep
        or FFN % etp
        or (changes["moe.moe_layers"] != "all" and FFN % tp)
        or LAYERS % (pp * vpp)
        or (vpp > 1 and (pp == 1 or micro % pp))
        or length % (tp * (2 * cp if cp > 1 else 1))
        or changes["moe.num_moe_experts"] < 2  # top-2 with one expert is illegal in any layout
    )
