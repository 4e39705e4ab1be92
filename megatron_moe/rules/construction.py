"""Rules of the construction methods on expert sizes, which `rules/check.py` includes.

Letters: E num_moe_experts, K moe_router_topk, F intermediate_size of the dense model, M
moe_ffn_hidden_size, S moe_shared_expert_intermediate_size, G = F / M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import nearest_multiples
from megatron_moe.experts.methods import METHODS, MethodRow, needs
from megatron_moe.experts.recipe import HELD_OUT_EVERY
from megatron_moe.experts.resolve import make_recipe
from megatron_moe.hf.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Case:
    moe: Moe
    upcycle: Upcycle
    dense_size: int

    @property
    def size(self) -> int:
        return self.moe.expert_size(self.dense_size)

    @property
    def shared(self) -> int:
        return self.moe.shared_size

    @property
    def method(self) -> MethodRow:
        return METHODS[self.upcycle.method]

    @property
    def with_method(self) -> str:
        return f"with upcycle.method ({self.upcycle.method})"


def construction_violations(config: RunConfig, spec: ModelSpec) -> Iterator[str]:
    """Yield the messages of all violated rules of upcycle.*."""
    case = _Case(config.moe, config.upcycle, spec.ffn_hidden_size)
    for rule in _RULES:
        yield from rule(case)
    recipe = make_recipe(spec, config.moe, config.upcycle)
    if recipe.fit_stream and spec.post_norms:
        yield (
            f"upcycle.fit_stream ({recipe.fit_stream}) must be 0 for a {spec.family} model: a norm "
            "between its FFN and the residual stream hides which output would restore the stream"
        )
    if needs(recipe) != "text" and config.upcycle.plan is not None:
        yield (
            f"upcycle.plan ({config.upcycle.plan}) has no effect with upcycle.method "
            f"({recipe.method}), this router and scale, which need nothing from a plan file.\n"
            "  leave upcycle.plan unset"
        )
    if needs(recipe) == "text" and config.upcycle.plan is None:
        subject = (
            f"upcycle.method ({recipe.method})"
            if METHODS[recipe.method].needs == "text"
            else "upcycle.router_init (centroids)"
            if recipe.router_init == "centroids"
            else f"upcycle.fit ({', '.join(recipe.fit)})"
            if recipe.fit
            else "a calibrated scale"
        )
        yield (
            f"{subject} is measured on text and needs upcycle.plan: the file that megatron-moe "
            "construct writes and train reads.\n  set upcycle.plan, and run megatron-moe construct "
            "CONFIG.yaml first"
        )


def measuring_violations(config: RunConfig, spec: ModelSpec) -> Iterator[str]:
    """Yield the reasons why `megatron-moe construct` cannot run."""
    recipe, samples = make_recipe(spec, config.moe, config.upcycle), config.measure.samples
    experts = config.moe.num_moe_experts
    if needs(recipe) != "text":
        yield (
            f"upcycle.method ({recipe.method}) with this router and scale needs no "
            "measurements: there is no plan file to write.\n  run megatron-moe train"
        )
    elif config.upcycle.plan is None:
        yield (
            "upcycle.plan must be set: it is the file that megatron-moe construct writes.\n"
            "  set upcycle.plan=runs/plan.safetensors"
        )
    if recipe.fit and samples < HELD_OUT_EVERY:
        yield (
            f"measure.samples ({samples}) must be at least {HELD_OUT_EVERY} with upcycle.fit: "
            f"every {HELD_OUT_EVERY}th sequence is left out of the fit, to choose its penalty.\n"
            f"  set measure.samples={HELD_OUT_EVERY} or more"
        )
    if METHODS[recipe.method].by_cluster and samples % experts:
        yield (
            f"measure.samples ({samples}) must be divisible by moe.num_moe_experts ({experts}): "
            "the sequences are divided into one cluster of equal size per expert.\n"
            f"  nearest measure.samples: {nearest_multiples(samples, experts)}"
        )


def _whole(case: _Case) -> Iterator[str]:
    if case.method.experts == "whole" and case.size != case.dense_size:
        yield (
            f"moe.moe_ffn_hidden_size ({case.size}) must equal the dense model's "
            f"intermediate_size ({case.dense_size}) {case.with_method}: each "
            "expert is the whole dense FFN.\n  leave moe.moe_ffn_hidden_size unset"
        )


def _granular(case: _Case) -> Iterator[str]:
    moe = case.moe
    if case.method.experts != "shards":
        return
    if case.dense_size % case.size:
        valid = [case.dense_size // g for g in range(1, 65) if case.dense_size % g == 0]
        yield (
            f"intermediate_size of the dense model ({case.dense_size}) must be divisible by "
            f"moe.moe_ffn_hidden_size ({case.size}) {case.with_method}: an expert is one of equal "
            f"shards.\n  valid moe_ffn_hidden_size: {', '.join(map(str, valid))}"
        )
        return
    shards = case.dense_size // case.size
    if moe.num_moe_experts % shards:
        yield (
            f"moe.num_moe_experts ({moe.num_moe_experts}) must be divisible by intermediate_size / "
            f"moe_ffn_hidden_size = {shards} {case.with_method}: experts are whole replicas of the "
            "dense FFN.\n  nearest num_moe_experts: "
            f"{nearest_multiples(moe.num_moe_experts, shards)}"
        )
    if (case.upcycle.scale or "exact") == "exact" and moe.moe_router_topk % shards:
        yield (
            f"moe.moe_router_topk ({moe.moe_router_topk}) must be divisible by intermediate_size / "
            f"moe_ffn_hidden_size = {shards} with upcycle.scale (exact): if a token misses a "
            "shard of the dense FFN, no factor can restore its output.\n"
            f"  nearest moe_router_topk: {nearest_multiples(moe.moe_router_topk, shards)}; or set "
            "upcycle.scale"
        )


def _partition(case: _Case) -> Iterator[str]:
    experts = case.moe.num_moe_experts
    taken = experts * case.size + case.shared
    if case.method.experts == "parts" and taken != case.dense_size:
        left = case.dense_size - case.shared
        way_out = (
            f"set moe.moe_ffn_hidden_size={left // experts}"
            if left > 0 and left % experts == 0
            else f"choose sizes so that num_moe_experts divides {left}"
        )
        yield (
            f"moe.num_moe_experts * moe_ffn_hidden_size + moe_shared_expert_intermediate_size = "
            f"{experts} * {case.size} + {case.shared} = {taken} must equal the dense model's "
            f"intermediate_size ({case.dense_size}) {case.with_method}: each neuron goes to one "
            f"expert.\n  {way_out}"
        )


def _sharing(case: _Case) -> Iterator[str]:
    if case.method.experts == "subsets" and ((taken := case.size + case.shared) > case.dense_size):
        yield (
            f"moe.moe_ffn_hidden_size + moe_shared_expert_intermediate_size = {case.size} + "
            f"{case.shared} = {taken} must be at most the dense model's intermediate_size "
            f"({case.dense_size}) {case.with_method}: an expert must not use a neuron twice.\n"
            f"  largest moe_ffn_hidden_size with this shared expert: "
            f"{max(case.dense_size - case.shared, 0)}"
        )


def _shared_expert(case: _Case) -> Iterator[str]:
    method = case.method
    if case.shared and method.shared == "none":
        others = ", ".join(name for name, row in METHODS.items() if row.shared != "none")
        yield (
            f"moe.moe_shared_expert_intermediate_size ({case.shared}) {case.with_method} has no "
            "neurons to use: the routed experts hold the whole dense FFN, and its neurons would "
            f"count twice.\n  methods with a shared expert: {others}"
        )
    if not case.shared and method.shared == "required":
        yield (
            f"upcycle.method ({case.upcycle.method}) needs "
            "moe.moe_shared_expert_intermediate_size: the method moves common neurons to a "
            "shared expert.\n  set it, or set upcycle.method="
            f"{method.without_shared} to have none"
        )


def _mix(case: _Case) -> Iterator[str]:
    sources, experts = 1 + len(case.upcycle.mix_with), case.moe.num_moe_experts
    if case.method.several_sources != (sources > 1):
        yield (
            f"upcycle.mix_with ({sources - 1} folders) {case.with_method}: method mix takes "
            "experts from source.path and at least one more dense model, other methods only from "
            "source.path.\n"
            "  set both or neither"
        )
    if sources > experts:
        yield (
            f"upcycle.mix_with names {sources - 1} dense models besides source.path, more than "
            f"moe.num_moe_experts ({experts}): each must provide an expert.\n"
            f"  set moe.num_moe_experts={sources} or more, or remove {sources - experts} of them"
        )


def _factors(case: _Case) -> Iterator[str]:
    u, granular = case.upcycle, case.method.experts == "shards"
    if u.scale is not None and not granular:
        yield (
            f"upcycle.scale ({u.scale}) requires upcycle.method (granular), but it is {u.method}: "
            "its factor is for whole replicas.\n  set upcycle.rescale instead"
        )
    if u.rescale is not None and granular:
        yield (
            f"upcycle.rescale ({u.rescale}) cannot be combined with upcycle.method (granular): its "
            "shards form whole replicas, which have their own factor.\n  set upcycle.scale instead"
        )
    if granular and u.scale == "paper" and u.rescale_at == "runtime":
        yield (
            "upcycle.rescale_at (runtime) cannot be combined with upcycle.scale (paper): the "
            "paper's factor scales gate, up and down; inside SiLU it is not a factor of the "
            "output.\n"
            "  set upcycle.rescale_at=weights, or upcycle.scale=exact"
        )
    if u.permutation_seed is not None and not case.method.by_position:
        yield (
            f"upcycle.permutation_seed ({u.permutation_seed}) has no effect {case.with_method}, "
            "which chooses neurons itself.\n  leave it unset, and set upcycle.seed"
        )


def _router(case: _Case) -> Iterator[str]:
    if case.upcycle.router_init == "virtual_groups" and case.method.experts != "shards":
        yield (
            f"upcycle.router_init (virtual_groups) {case.with_method}: only experts of method "
            "granular are shards of replicas that must be chosen together.\n"
            "  leave upcycle.router_init unset, or set upcycle.method=granular"
        )


def _fit(case: _Case) -> Iterator[str]:
    u = case.upcycle
    if case.method.routed and "router" not in u.fit:
        fit = ", ".join(u.fit) or "nothing"
        yield (
            f"upcycle.fit ({fit}) {case.with_method} must contain router: the "
            "method groups neurons by what a fitted router sends to them.\n"
            "  set upcycle.fit=[router,down], or upcycle.method=split_coactivation"
        )
    if not u.fit:
        return
    named = f"upcycle.fit ({', '.join(u.fit)})"
    if not case.method.sums_parts:
        methods = ", ".join(name for name, row in METHODS.items() if row.sums_parts)
        yield (
            f"{named} {case.with_method}: it solves for experts that are parts of the dense FFN.\n"
            f"  set upcycle.method to one of {methods}, or leave upcycle.fit empty"
        )
    if u.reinit_ratio or u.noise_std:
        yield (
            f"{named} cannot be combined with upcycle.reinit_ratio ({u.reinit_ratio}) or "
            f"upcycle.noise_std ({u.noise_std}): they change the neurons that were solved for.\n"
            "  leave them unset"
        )
    if "calibrated" in (u.rescale, u.scale):
        yield (
            f"{named} cannot be combined with upcycle.rescale (calibrated): the solution has its "
            "own magnitude.\n  leave upcycle.rescale unset"
        )
    if "router" in u.fit and u.router_init is not None:
        yield (
            f"upcycle.router_init ({u.router_init}) has no effect with {named}, which solves for "
            "the router's rows.\n  leave upcycle.router_init unset"
        )
    if "router" in u.fit and case.moe.num_moe_experts < 2:
        yield (
            f"{named} needs moe.num_moe_experts ({case.moe.num_moe_experts}) to be at least 2: a "
            "router of one expert has nothing to choose.\n  set moe.num_moe_experts=2 or more"
        )
    if case.moe.router_gate != "linear":
        yield (
            f"{named} requires moe.router_gate (linear), but it is {case.moe.router_gate}: its "
            "choices are random in training.\n  set moe.router_gate=linear"
        )


_RULES = (
    _whole, _granular, _partition, _sharing, _shared_expert, _mix, _factors, _router, _fit,
)  # fmt: skip
