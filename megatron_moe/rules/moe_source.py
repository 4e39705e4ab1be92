"""Rules of runs that start from a MoE: what must stay as in the source, and what may change.

Letters: E num_moe_experts, K moe_router_topk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_moe.config.moe import Method
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.resolve import chosen_by, moe_layer_ids, twins_of
from megatron_moe.hf.moe_spec import ExpertsSpec
from megatron_moe.hf.spec import ModelSpec

_NUMBERS = ("num_moe_experts", "moe_router_topk")
_UNUSED = ("plan", "reinit_ratio", "scale", "rescale", "permutation_seed", "router_init")
"""Settings of ``upcycle`` that describe how a dense FFN becomes experts."""


def source_violations(config: RunConfig, spec: ModelSpec) -> Iterator[str]:
    """Yield the messages of violated rules on the source and the method.

    Without any, `construction_violations` applies to a dense source, and nothing else to a MoE.
    """
    method, experts = config.upcycle.method, spec.experts
    row = METHODS[method]
    if experts is None:
        yield from _dense_source(config)
    elif not (row.of_moe or row.splits_experts):
        finer = ", ".join(name for name, other in METHODS.items() if other.splits_experts)
        yield (
            f"upcycle.method ({method}) needs a dense model in source.path "
            f"({config.source.path}), but it is a {spec.family} model with "
            f"{experts.num_moe_experts} experts: there is no dense FFN to build experts from.\n"
            "  set upcycle.method=keep to continue it, or grow or prune; or split its experts: "
            f"{finer}"
        )
    else:
        for rule in (_same, _number, _parts, _top_k, _twins, _choose, _unused, _optimizer_state):
            yield from rule(config, spec, experts)


def _dense_source(config: RunConfig) -> Iterator[str]:
    upcycle = config.upcycle
    if METHODS[upcycle.method].of_moe:
        yield (
            f"upcycle.method ({upcycle.method}) needs a MoE model in source.path "
            f"({config.source.path}), but it is dense: there are no experts to take.\n"
            "  set upcycle.method=copy, or another method for dense sources"
        )
        return
    for name in ("twins", "choose"):
        if (value := getattr(upcycle, name)) is not None:
            yield (
                f"upcycle.{name} ({value}) has no effect with upcycle.method ({upcycle.method}): "
                f"it is for experts of a MoE source.\n  leave upcycle.{name} unset"
            )
    if config.source.optimizer_state is not None:
        yield (
            f"source.optimizer_state ({config.source.optimizer_state}) needs a MoE in source.path "
            f"({config.source.path}), but it is dense: its run had no experts and no router.\n"
            "  leave source.optimizer_state unset"
        )
    if config.moe.moe_shared_expert_gate:
        yield (
            "moe.moe_shared_expert_gate (true) needs a MoE source that has the gate: a dense FFN "
            "has no values for it.\n  leave moe.moe_shared_expert_gate unset"
        )


def _may_change(method: Method) -> tuple[str, ...]:
    """Return settings of ``moe`` that a method may set to other values than the source has."""
    if METHODS[method].splits_experts:
        return (*_NUMBERS, "moe_ffn_hidden_size")
    return () if method == "keep" else _NUMBERS


def _same(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    moe, method = config.moe, config.upcycle.method
    if moe_layer_ids(moe, spec.num_layers) != experts.moe_layers:
        yield (
            f"moe.moe_layers ({moe.moe_layers}) must be the MoE layers of the source "
            f"({list(experts.moe_layers)}): method {method} takes experts from the same layer.\n"
            "  leave moe.moe_layers unset"
        )
    for field in fields(experts):
        name, value = field.name, getattr(experts, field.name)
        if name == "moe_layers" or name in _may_change(method):
            continue
        if (ours := getattr(moe, name)) != value and not (
            name == "moe_ffn_hidden_size" and moe.expert_size(spec.ffn_hidden_size) == value
        ):
            yield (
                f"moe.{name} ({ours}) must be {value} as in the source with upcycle.method "
                f"({method}): the trained experts and router would compute something else.\n"
                f"  leave moe.{name} unset"
            )


def _number(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    ours, theirs = config.moe.num_moe_experts, experts.num_moe_experts
    method, even = config.upcycle.method, chosen_by(config.upcycle) == "even"
    if (method == "grow" and ours <= theirs) or (method == "prune" and ours >= theirs):
        relation = "more than" if method == "grow" else "less than"
        yield (
            f"moe.num_moe_experts ({ours}) must be {relation} the source's {theirs} with "
            f"upcycle.method ({method}).\n  set another number, or upcycle.method=keep"
        )
    elif method == "grow" and even and ours % theirs:
        yield (
            f"moe.num_moe_experts ({ours}) must be a multiple of the source's {theirs} with "
            "upcycle.choose (even): each expert is copied equally often.\n"
            f"  nearest num_moe_experts: {_grown(ours, theirs)}; or set upcycle.choose"
        )
    elif method == "prune" and even and theirs % ours:
        yield (
            f"moe.num_moe_experts ({ours}) must divide the source's {theirs} with upcycle.choose "
            "(even): experts at equal distances are kept.\n"
            f"  valid num_moe_experts: {[n for n in range(1, theirs) if theirs % n == 0]}"
        )


def _grown(ours: int, theirs: int) -> str:
    """Return the multiples of the source's number of experts next to ``ours``, itself left out."""
    below = ours // theirs * theirs
    return ", ".join(str(n) for n in (below, below + theirs) if n > theirs)


def _parts(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    """Yield why the parts of the experts cannot compute what the source computes."""
    moe, with_method = config.moe, f"with upcycle.method ({config.upcycle.method})"
    if not METHODS[config.upcycle.method].splits_experts:
        return
    theirs, size = experts.num_moe_experts, experts.moe_ffn_hidden_size
    count = moe.num_moe_experts // theirs
    if count < 2 or moe.num_moe_experts % theirs or size % count:
        valid = [theirs * g for g in range(2, 65) if size % g == 0]
        yield (
            f"moe.num_moe_experts ({moe.num_moe_experts}) must be a multiple of the source's "
            f"{theirs} {with_method}, by a number that divides their {size} neurons: each expert "
            f"is split into parts of equal size.\n  valid num_moe_experts: {valid}"
        )
        return
    if moe.expert_size(spec.ffn_hidden_size) != size // count:
        yield (
            f"moe.moe_ffn_hidden_size ({moe.moe_ffn_hidden_size}) must be {size // count} "
            f"{with_method}: each of the source's experts of {size} neurons is split into {count} "
            "parts.\n  leave moe.moe_ffn_hidden_size unset"
        )
    if moe.moe_router_topk != experts.moe_router_topk * count:
        yield (
            f"moe.moe_router_topk ({moe.moe_router_topk}) must be "
            f"{experts.moe_router_topk * count}, the source's {experts.moe_router_topk} times "
            f"{count} parts, {with_method}: parts of an expert have equal logits, so that a token "
            "chooses all of them.\n  leave moe.moe_router_topk unset"
        )
    if moe.moe_router_score_function == "sigmoid" and experts.moe_router_topk == 1:
        yield (
            f"upcycle.method ({config.upcycle.method}) is not possible for a source with "
            "moe.moe_router_topk (1) and moe.moe_router_score_function (sigmoid): a single score "
            "is a weight as it is, but those of several parts are divided by their sum.\n"
            "  set upcycle.method=keep, or grow with upcycle.twins=noise"
        )


def _top_k(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    """Yield why copies cannot compute what the source computes.

    With K' = m K, a token chooses all m copies of the K experts, because they have equal logits.
    Softmax over the chosen ones divides each weight by m, softmax over all E likewise, and so does
    the sum of sigmoid scores; the m copies add up to the expert. With fewer, a token would choose
    several copies of few experts: no rows of a linear router without bias keep the other copies
    below the K-th logit for a token x and for -x.
    """
    moe, upcycle = config.moe, config.upcycle
    if twins_of(upcycle) != "exact":
        return
    if chosen_by(upcycle) != "even":
        yield (
            f"upcycle.twins (exact) needs upcycle.choose ({upcycle.choose}) to be even: experts "
            "with more copies than others would be chosen in place of others.\n"
            "  set upcycle.choose=even, or upcycle.twins=noise"
        )
    elif moe.num_moe_experts % experts.num_moe_experts == 0:
        count = moe.num_moe_experts // experts.num_moe_experts
        needed = experts.moe_router_topk * count
        if moe.moe_router_topk != needed:
            yield (
                f"moe.moe_router_topk ({moe.moe_router_topk}) must be {needed}, the source's "
                f"{experts.moe_router_topk} times {count} copies, with upcycle.twins (exact): "
                "copies have equal logits, so a smaller top-k chooses several copies of fewer "
                "experts.\n  leave moe.moe_router_topk unset, or set upcycle.twins=noise"
            )
    if moe.moe_router_score_function == "sigmoid" and experts.moe_router_topk == 1:
        yield (
            "upcycle.twins (exact) is not possible for a source with moe.moe_router_topk (1) and "
            "moe.moe_router_score_function (sigmoid): a single score is a weight as it is, but "
            "those of several copies are divided by their sum.\n  set upcycle.twins=noise"
        )


def _twins(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    upcycle = config.upcycle
    if upcycle.twins is not None and upcycle.method != "grow":
        yield (
            f"upcycle.twins ({upcycle.twins}) requires upcycle.method (grow), but it is "
            f"{upcycle.method}: only growing makes copies.\n  leave upcycle.twins unset"
        )
    if upcycle.noise_std and twins_of(upcycle) != "noise":
        yield (
            f"upcycle.noise_std ({upcycle.noise_std}) requires upcycle.twins (noise) with "
            f"upcycle.method ({upcycle.method}): the weights of experts are those of the source "
            "otherwise.\n  leave upcycle.noise_std unset"
        )


def _choose(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    upcycle = config.upcycle
    choices = METHODS[upcycle.method].choices
    if upcycle.choose is not None and not choices:
        yield (
            f"upcycle.choose ({upcycle.choose}) has no effect with upcycle.method "
            f"({upcycle.method}): all experts are split.\n  leave upcycle.choose unset"
        )
    elif upcycle.choose is not None and upcycle.choose not in choices:
        yield (
            f"upcycle.choose ({upcycle.choose}) with upcycle.method ({upcycle.method}) must be one "
            f"of {', '.join(choices)}.\n  leave upcycle.choose unset"
        )
    if choices and chosen_by(upcycle) != "even" and upcycle.plan is None:
        yield (
            f"upcycle.choose ({chosen_by(upcycle)}) is measured on text and needs upcycle.plan: "
            "the file that megatron-moe construct writes and train reads.\n  set upcycle.plan, and "
            "run megatron-moe construct CONFIG.yaml first; or set upcycle.choose=even"
        )


def _unused(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    upcycle, moe = config.upcycle, config.moe
    names = _UNUSED[1:] if chosen_by(upcycle) != "even" else _UNUSED
    values = {name: value for name in names if (value := getattr(upcycle, name)) is not None}
    values |= {name: value for name in ("mix_with", "fit") if (value := getattr(upcycle, name))}
    for name, value in values.items():
        yield (
            f"upcycle.{name} ({value}) has no effect with upcycle.method ({upcycle.method}): it "
            f"is for building experts from a dense FFN.\n  leave upcycle.{name} unset"
        )
    if moe.router_gate != "linear":
        yield (
            f"moe.router_gate ({moe.router_gate}) must be linear with upcycle.method "
            f"({upcycle.method}): the router of the source is one linear layer.\n"
            "  leave moe.router_gate unset"
        )


def _optimizer_state(config: RunConfig, spec: ModelSpec, experts: ExpertsSpec) -> Iterator[str]:
    folder, row = config.source.optimizer_state, METHODS[config.upcycle.method]
    if folder is None:
        return
    if config.optimizer.optimizer != "adam":
        yield (
            f"source.optimizer_state ({folder}) needs optimizer.optimizer (adam), but it is "
            f"{config.optimizer.optimizer}: it takes over AdamW's moments.\n"
            "  leave source.optimizer_state unset"
        )
    if row.splits_experts or chosen_by(config.upcycle) == "merge":
        yield (
            f"source.optimizer_state ({folder}) needs experts that are copies of source experts, "
            f"but upcycle.method ({config.upcycle.method}) splits or merges them.\n"
            "  leave source.optimizer_state unset"
        )
