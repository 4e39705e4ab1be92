"""Rules of MoE layers, experts and routers."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.moe import Moe
from megatron_moe.config.parts import layers_of_name
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.rules.case import Case, indivisible
from megatron_moe.rules.construction import construction_violations
from megatron_moe.rules.moe_source import source_violations


def construction(case: Case) -> Iterator[str]:
    """Check that the method can build these experts from this source."""
    if problems := list(source_violations(case.config, case.spec)):
        yield from problems
    elif case.spec.experts is None:
        yield from construction_violations(case.config, case.spec)


def shared_expert(case: Case) -> Iterator[str]:
    """Check that tp divides the shared expert."""
    tp = case.config.parallel.tensor_parallel_size
    size = case.config.moe.shared_size
    if size % tp:
        yield indivisible(
            "moe.moe_shared_expert_intermediate_size", size,
            "parallel.tensor_parallel_size", tp, "the shared expert is sharded over tp",
        )  # fmt: skip


def moe_layers(case: Case) -> Iterator[str]:
    """Check that the layers that become MoE layers exist."""
    moe = case.config.moe
    layers = moe_layer_ids(moe, case.spec.num_layers)
    if moe.moe_layers != "all" and (moe.first_dense_layers or moe.last_dense_layers):
        yield (
            f"moe.first_dense_layers ({moe.first_dense_layers}) and moe.last_dense_layers "
            f"({moe.last_dense_layers}) require moe.moe_layers (all), but it is a list.\n"
            "  remove the dense layers from the list"
        )
    if moe.first_dense_layers + moe.last_dense_layers >= case.spec.num_layers:
        yield (
            f"moe.first_dense_layers ({moe.first_dense_layers}) + moe.last_dense_layers "
            f"({moe.last_dense_layers}) must be less than the dense model's num_hidden_layers "
            f"({case.spec.num_layers}): otherwise the model stays dense.\n"
            f"  largest sum: {case.spec.num_layers - 1}"
        )
    elif not layers:
        yield (
            "moe.moe_layers ([]) must name at least one layer: otherwise the model stays dense."
            "\n  set moe.moe_layers=all"
        )
    if outside := [layer for layer in layers if layer >= case.spec.num_layers]:
        yield (
            f"moe.moe_layers names {outside}, but the dense model has {case.spec.num_layers} "
            f"layers.\n  valid ids: 0 to {case.spec.num_layers - 1}"
        )
    if len(set(layers)) != len(layers):
        yield (
            f"moe.moe_layers ({list(layers)}) names a layer twice.\n"
            f"  set moe.moe_layers={sorted(set(layers))}"
        )


def capacity(case: Case) -> Iterator[str]:
    """Check that the settings of dropping and padding are consistent."""
    moe = case.config.moe
    if moe.moe_expert_capacity_factor is None:
        for name, unset in (
            ("moe_pad_expert_input_to_capacity", False), ("moe_token_drop_policy", "probs"),
            ("capacity_formula", "megatron"), ("capacity_scope", "rank"),
        ):  # fmt: skip
            if (value := getattr(moe, name)) != unset:
                yield (
                    f"moe.{name} ({value}) needs moe.moe_expert_capacity_factor: without it, "
                    "no token is dropped.\n  set moe.moe_expert_capacity_factor, or leave "
                    f"moe.{name} unset"
                )
        return
    if not moe.moe_pad_expert_input_to_capacity:
        return
    if moe.capacity_scope == "sequence":
        yield (
            "moe.capacity_scope (sequence) cannot be combined with "
            "moe.moe_pad_expert_input_to_capacity (true): an expert then takes a different number "
            "of tokens from each rank, so there is no common size to pad to.\n"
            "  set moe.capacity_scope=rank"
        )
    factor = moe.megatron_capacity_factor
    assert factor is not None
    if factor * moe.moe_router_topk > moe.num_moe_experts:
        yield (
            f"moe.moe_expert_capacity_factor ({moe.moe_expert_capacity_factor}) gives a capacity "
            "above the number of tokens, which moe.moe_pad_expert_input_to_capacity (true) cannot "
            f"pad to.\n  largest moe.moe_expert_capacity_factor: "
            f"{moe.moe_expert_capacity_factor / factor * moe.num_moe_experts / moe.moe_router_topk}"
        )


def dispatcher(case: Case) -> Iterator[str]:
    """Check that the flex dispatcher supports this layout and padding."""
    moe, p = case.config.moe, case.config.parallel
    if moe.moe_token_dispatcher_type != "flex":
        return
    if p.expert_parallel_size * p.expert_tensor_parallel_size == 1:
        yield (
            "moe.moe_token_dispatcher_type (flex) needs parallel.expert_parallel_size (1) * "
            "parallel.expert_tensor_parallel_size (1) to be at least 2: every expert is on the "
            "rank of its tokens, and there is nothing to send.\n"
            "  set moe.moe_token_dispatcher_type=alltoall"
        )
    if moe.moe_flex_dispatcher_backend == "deepep" and moe.moe_pad_expert_input_to_capacity:
        yield (
            "moe.moe_flex_dispatcher_backend (deepep) cannot be combined with "
            "moe.moe_pad_expert_input_to_capacity (true): DeepEP sends each token to its chosen "
            "experts and has no padding.\n  set moe.moe_flex_dispatcher_backend=hybridep, or "
            "leave moe.moe_pad_expert_input_to_capacity unset"
        )


def router(case: Case) -> Iterator[str]:
    """Check that the router's gate, score function, balancing and order are compatible."""
    moe = case.config.moe
    sigmoid = moe.moe_router_score_function == "sigmoid"
    if moe.moe_router_enable_expert_bias and not sigmoid:
        yield (
            "moe.moe_router_enable_expert_bias (true) needs moe.moe_router_score_function "
            "(softmax) to be sigmoid: the bias is added to independent scores of experts.\n"
            "  set moe.moe_router_score_function=sigmoid"
        )
    noisy = moe.router_gate.startswith("noisy_")
    if noisy and sigmoid:
        yield (
            f"moe.router_gate ({moe.router_gate}) needs moe.moe_router_score_function (sigmoid) to "
            "be softmax: the noisy gate is defined only with softmax.\n"
            "  set moe.moe_router_score_function=softmax"
        )
    if moe.moe_router_load_balancing_type == "cv_squared" and not noisy:
        yield (
            "moe.moe_router_load_balancing_type (cv_squared) needs moe.router_gate (linear) to be "
            "noisy: its load is defined as a probability under the gate's noise.\n"
            "  set moe.router_gate=noisy_linear or moe.moe_router_load_balancing_type=aux_loss"
        )
    yield from _adaptive(moe)
    yield from _revived(case.config)
    yield from _recorded(case.config)
    if sigmoid and moe.router_order != "topk_softmax":
        yield (
            f"moe.router_order ({moe.router_order}) has no effect with "
            "moe.moe_router_score_function (sigmoid): the scores of chosen experts are divided by "
            "their sum.\n  leave moe.router_order unset"
        )


def _adaptive(moe: Moe) -> Iterator[str]:
    """Check that there is a loss whose coefficient can adapt, and settings only if it does."""
    no_loss = moe.moe_router_load_balancing_type == "none" or not moe.moe_aux_loss_coeff
    if moe.adaptive_aux_loss and no_loss:
        yield (
            "moe.adaptive_aux_loss (true) needs a load-balancing loss: "
            f"moe.moe_router_load_balancing_type is {moe.moe_router_load_balancing_type} and "
            f"moe.moe_aux_loss_coeff, the upper bound of the coefficients, is "
            f"{moe.moe_aux_loss_coeff}.\n"
            "  set both, or leave moe.adaptive_aux_loss unset"
        )
    for name in ("aux_loss_sensitivity", "aux_loss_decay"):
        value, default = getattr(moe, name), Moe.model_fields[name].default
        if not moe.adaptive_aux_loss and value != default:
            yield (
                f"moe.{name} ({value}) has no effect without moe.adaptive_aux_loss: the "
                f"coefficient is constant.\n  set moe.adaptive_aux_loss=true, or leave moe.{name} "
                "unset"
            )


def _revived(config: RunConfig) -> Iterator[str]:
    """Check that dead experts can be re-created, and that a copy can get tokens and learn."""
    moe = config.moe
    if moe.revive_after_steps is None:
        if moe.revive_below_load != Moe.model_fields["revive_below_load"].default:
            yield (
                f"moe.revive_below_load ({moe.revive_below_load}) has no effect without "
                "moe.revive_after_steps: no expert is re-created.\n"
                "  set moe.revive_after_steps, or leave moe.revive_below_load unset"
            )
        return
    setting = f"moe.revive_after_steps ({moe.revive_after_steps})"
    way_out = "leave moe.revive_after_steps unset"
    if moe.moe_router_topk == 1:
        yield (
            f"{setting} needs moe.moe_router_topk (1) to be at least 2: a re-created expert ranks "
            f"below the one that it copies, and would get no token.\n  {way_out}"
        )
    elif moe.moe_router_topk == moe.num_moe_experts:
        yield (
            f"{setting} needs moe.moe_router_topk ({moe.moe_router_topk}) to be less than "
            f"moe.num_moe_experts: every expert gets all tokens, so none is dead.\n  {way_out}"
        )
    lists = [config.train.freeze, *(stage.freeze for stage in config.train.stages)]
    names = dict.fromkeys(name for named in lists for name in named)
    if frozen := [name for name in names if layers_of_name(name)[0] in ("router", "experts")]:
        yield (
            f"{setting} cannot be combined with frozen {', '.join(frozen)} (train.freeze or "
            "train.stages): re-creating an expert changes its weights and its router row.\n"
            f"  do not freeze routers or experts, or {way_out}"
        )
    if moe.replay_routing is not None:
        yield (
            f"{setting} cannot be combined with moe.replay_routing ({moe.replay_routing}): tokens "
            "go to the recorded experts, so a re-created one would stay without.\n"
            f"  {way_out}"
        )
    if config.teacher.router_weight:
        yield (
            f"{setting} cannot be combined with teacher.router_weight "
            f"({config.teacher.router_weight}): it compares each expert with the neurons that the "
            f"expert was made of, which a re-created one has no more.\n"
            f"  set teacher.router_weight=0, or {way_out}"
        )


def _recorded(config: RunConfig) -> Iterator[str]:
    """Check that a record is not read and written at once, and that ranks keep their samples."""
    moe = config.moe
    if moe.record_routing is not None and moe.replay_routing is not None:
        yield (
            f"moe.record_routing ({moe.record_routing}) and moe.replay_routing "
            f"({moe.replay_routing}) exclude each other: replayed choices are recorded already.\n"
            "  set only one of them"
        )
    if moe.records_or_replays and config.guard.device_check_interval is not None:
        name = "record_routing" if moe.record_routing is not None else "replay_routing"
        yield (
            f"moe.{name} cannot be combined with guard.device_check_interval "
            f"({config.guard.device_check_interval}): a checked step computes the samples of "
            "another rank.\n  leave guard.device_check_interval unset"
        )
