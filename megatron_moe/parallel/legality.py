"""Every rule a configuration must keep, checked together before any process group exists.

Each rule is one function over a `Case` and yields messages of one form: the setting and its value,
the rule, the other setting and its value, why the rule exists, and, indented, the way out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.mixtures import starting_weights
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.experts.plan import moe_layer_ids
from megatron_moe.experts.rules import construction_violations
from megatron_moe.hf.spec import DenseSpec
from megatron_moe.parallel.nearest import changes, nearest_layout


@dataclass(frozen=True, slots=True)
class Case:
    """What the rules look at."""

    config: RunConfig
    spec: DenseSpec
    world_size: int

    @property
    def vpp(self) -> int:
        """Model chunks of a pipeline rank."""
        return self.config.parallel.virtual_pipeline_parallel_size or 1

    @property
    def expert_ffn(self) -> int:
        """Neurons of one expert."""
        return self.config.moe.moe_ffn_hidden_size or self.spec.ffn_hidden_size


def check(config: RunConfig, spec: DenseSpec, world_size: int) -> None:
    """Refuse a configuration that cannot run.

    Raises:
        ConfigError: Every violated rule, with the numbers and the nearest values that keep it.
    """
    if found := violations(config, spec, world_size):
        way_out = legal_layout(config, spec, world_size)
        raise ConfigError("\n".join([*found, *way_out]))


def legal_layout(config: RunConfig, spec: DenseSpec, world_size: int) -> list[str]:
    """A line with the nearest layout that keeps all rules of layouts; none where it needs none.

    Rules that look at no degree are left out: another layout does not help them.
    """

    def broken(parallel: Parallel) -> bool:
        case = Case(config.model_copy(update={"parallel": parallel}), spec, world_size)
        return any(True for rule in LAYOUT_RULES for _ in rule(case))

    before = config.parallel
    if not broken(before):
        return []
    found = nearest_layout(
        before,
        world_size=world_size,
        num_layers=spec.num_layers,
        is_legal=lambda parallel: not broken(parallel),
    )
    if found is None:
        return [f"  no layout of {world_size} ranks is legal with the other settings"]
    return [f"  nearest legal layout of {world_size} ranks: {changes(before, found)}"]


def violations(config: RunConfig, spec: DenseSpec, world_size: int) -> list[str]:
    """Every violated rule in words; an empty list means the configuration can run."""
    case = Case(config, spec, world_size)
    return [message for rule in RULES for message in rule(case)]


def _world(case: Case) -> Iterator[str]:
    p = case.config.parallel
    for axis, degrees in (
        ("dp", {"pp": p.pipeline_parallel_size, "cp": p.context_parallel_size,
                "tp": p.tensor_parallel_size}),
        ("edp", {"pp": p.pipeline_parallel_size, "ep": p.expert_parallel_size,
                 "etp": p.expert_tensor_parallel_size}),
    ):  # fmt: skip
        product = math.prod(degrees.values())
        if case.world_size % product:
            names, values = " * ".join(degrees), " * ".join(map(str, degrees.values()))
            yield (
                f"world_size ({case.world_size}) must be divisible by {names} = {values} = "
                f"{product}: {axis} is what is left over.\n"
                f"  nearest world_size: {_nearest_multiples(case.world_size, product)}"
            )


def _heads(case: Case) -> Iterator[str]:
    tp = case.config.parallel.tensor_parallel_size
    if case.spec.num_query_groups % tp:
        yield _indivisible(
            "num_key_value_heads of the dense model", case.spec.num_query_groups,
            "parallel.tensor_parallel_size", tp, "each tp rank holds whole query groups",
        )  # fmt: skip


def _experts(case: Case) -> Iterator[str]:
    moe, p = case.config.moe, case.config.parallel
    if moe.num_moe_experts % p.expert_parallel_size:
        yield _indivisible(
            "moe.num_moe_experts", moe.num_moe_experts,
            "parallel.expert_parallel_size", p.expert_parallel_size,
            "each ep rank holds whole experts",
        )  # fmt: skip
    if case.expert_ffn % p.expert_tensor_parallel_size:
        yield _indivisible(
            "moe.moe_ffn_hidden_size", case.expert_ffn,
            "parallel.expert_tensor_parallel_size", p.expert_tensor_parallel_size,
            "each etp rank holds as many neurons of an expert",
        )  # fmt: skip
    if moe.moe_router_topk > moe.num_moe_experts:
        yield (
            f"moe.moe_router_topk ({moe.moe_router_topk}) must be at most moe.num_moe_experts "
            f"({moe.num_moe_experts}): a token goes to different experts.\n"
            f"  largest moe.moe_router_topk: {moe.num_moe_experts}"
        )
    softmax = moe.moe_router_score_function == "softmax"
    if moe.moe_router_topk == 1 and moe.router_order == "topk_softmax" and softmax:
        yield (
            "moe.moe_router_topk (1) with moe.router_order (topk_softmax) is not trainable: the "
            "softmax over one chosen expert is always 1, so the router gets no gradient.\n"
            "  set moe.router_order=softmax_topk or moe.moe_router_topk=2"
        )


def _capacity(case: Case) -> Iterator[str]:
    moe = case.config.moe
    if moe.moe_expert_capacity_factor is None:
        for name, unset in (
            ("moe_pad_expert_input_to_capacity", False), ("moe_token_drop_policy", "probs"),
            ("capacity_formula", "megatron"), ("capacity_scope", "rank"),
        ):  # fmt: skip
            if (value := getattr(moe, name)) != unset:
                yield (
                    f"moe.{name} ({value}) needs moe.moe_expert_capacity_factor: without one "
                    "nothing is dropped.\n  set moe.moe_expert_capacity_factor, or leave "
                    f"moe.{name} unset"
                )
        return
    if not moe.moe_pad_expert_input_to_capacity:
        return
    if moe.capacity_scope == "sequence":
        yield (
            "moe.capacity_scope (sequence) cannot be with moe.moe_pad_expert_input_to_capacity "
            "(true): an expert then takes another number of tokens from each rank, and there is no "
            "one number to pad to.\n  set moe.capacity_scope=rank"
        )
    factor = moe.megatron_capacity_factor
    assert factor is not None
    if factor * moe.moe_router_topk > moe.num_moe_experts:
        yield (
            f"moe.moe_expert_capacity_factor ({moe.moe_expert_capacity_factor}) makes a capacity "
            "larger than all tokens, which moe.moe_pad_expert_input_to_capacity (true) cannot pad "
            f"to.\n  largest moe.moe_expert_capacity_factor: "
            f"{moe.moe_expert_capacity_factor / factor * moe.num_moe_experts / moe.moe_router_topk}"
        )


def _router(case: Case) -> Iterator[str]:
    moe = case.config.moe
    sigmoid = moe.moe_router_score_function == "sigmoid"
    if moe.moe_router_enable_expert_bias and not sigmoid:
        yield (
            "moe.moe_router_enable_expert_bias (true) needs moe.moe_router_score_function "
            "(softmax) to be sigmoid: the bias is added to scores of experts taken alone.\n"
            "  set moe.moe_router_score_function=sigmoid"
        )
    noisy = moe.router_gate != "linear"
    if noisy and sigmoid:
        yield (
            f"moe.router_gate ({moe.router_gate}) needs moe.moe_router_score_function (sigmoid) to "
            "be softmax, which the noisy gate is defined with.\n"
            "  set moe.moe_router_score_function=softmax"
        )
    if moe.moe_router_load_balancing_type == "cv_squared" and not noisy:
        yield (
            "moe.moe_router_load_balancing_type (cv_squared) needs moe.router_gate (linear) to be "
            "noisy: its load is a probability under the gate's noise.\n"
            "  set moe.router_gate=noisy_linear or moe.moe_router_load_balancing_type=aux_loss"
        )
    if sigmoid and moe.router_order != "topk_softmax":
        yield (
            f"moe.router_order ({moe.router_order}) has no meaning with "
            "moe.moe_router_score_function (sigmoid): scores of the chosen are divided by their "
            "sum.\n  leave moe.router_order unset"
        )


def _construction(case: Case) -> Iterator[str]:
    return construction_violations(case.config, case.spec)


def _shared_expert(case: Case) -> Iterator[str]:
    tp = case.config.parallel.tensor_parallel_size
    size = case.config.moe.moe_shared_expert_intermediate_size or 0
    if size % tp:
        yield _indivisible(
            "moe.moe_shared_expert_intermediate_size", size,
            "parallel.tensor_parallel_size", tp, "the shared expert is split over tp",
        )  # fmt: skip


def _moe_layers(case: Case) -> Iterator[str]:
    moe = case.config.moe
    layers = moe_layer_ids(moe, case.spec.num_layers)
    if moe.moe_layers != "all" and (moe.first_dense_layers or moe.last_dense_layers):
        yield (
            f"moe.first_dense_layers ({moe.first_dense_layers}) and moe.last_dense_layers "
            f"({moe.last_dense_layers}) are for moe.moe_layers (all), but it is a list.\n"
            "  leave the dense layers out of the list"
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


def _dense_ffn(case: Case) -> Iterator[str]:
    tp = case.config.parallel.tensor_parallel_size
    some_dense = len(moe_layer_ids(case.config.moe, case.spec.num_layers)) < case.spec.num_layers
    if some_dense and case.spec.ffn_hidden_size % tp:
        yield _indivisible(
            "intermediate_size of the dense model", case.spec.ffn_hidden_size,
            "parallel.tensor_parallel_size", tp, "the layers that stay dense are split over tp",
        )  # fmt: skip


def _pipeline(case: Case) -> Iterator[str]:
    pp, layers = case.config.parallel.pipeline_parallel_size, case.spec.num_layers
    if case.vpp > 1 and pp == 1:
        yield (
            f"parallel.virtual_pipeline_parallel_size ({case.vpp}) needs "
            "parallel.pipeline_parallel_size of at least 2: chunks are interleaved between stages."
            "\n  leave parallel.virtual_pipeline_parallel_size unset"
        )
    elif layers % (pp * case.vpp):
        fits = [f"{a}x{b}" for a in range(1, layers + 1) for b in range(1, layers // a + 1)
                if layers % (a * b) == 0 and (a > 1 or b == 1)]  # fmt: skip
        near = sorted(fits, key=lambda ab: abs(math.prod(map(int, ab.split("x"))) - pp * case.vpp))
        yield (
            f"num_hidden_layers of the dense model ({layers}) must be divisible by "
            f"pp * vpp = {pp} * {case.vpp} = {pp * case.vpp}: every chunk holds as many layers.\n"
            f"  nearest pp x vpp: {', '.join(near[:4])}"
        )


def _sequence(case: Case) -> Iterator[str]:
    p, length = case.config.parallel, case.config.data.seq_length
    tp, cp = p.tensor_parallel_size, p.context_parallel_size
    # Zigzag context parallelism cuts the sequence into 2 * cp chunks; each cp rank's part is then
    # scattered over tp (sequence parallelism).
    unit = (2 * cp if cp > 1 else 1) * tp
    if length % unit:
        names = "2 * cp * tp" if cp > 1 else "tp"
        yield (
            f"data.seq_length ({length}) must be divisible by {names} = {unit}: the sequence is "
            f"shared by these ranks.\n  nearest data.seq_length: {_nearest_multiples(length, unit)}"
        )
    if length > case.spec.max_position_embeddings:
        yield (
            f"data.seq_length ({length}) must be at most the dense model's "
            f"max_position_embeddings ({case.spec.max_position_embeddings}): it has not seen "
            "positions beyond.\n"
            f"  largest data.seq_length: {case.spec.max_position_embeddings}"
        )


def _tp_overlap(case: Case) -> Iterator[str]:
    tp = case.config.parallel.tensor_parallel_size
    if case.config.train.tp_comm_overlap and tp == 1:
        yield (
            "train.tp_comm_overlap (true) needs parallel.tensor_parallel_size (1) to be at least "
            "2: there is no communication to overlap.\n  leave train.tp_comm_overlap unset"
        )


def _batch(case: Case) -> Iterator[str]:
    p, train = case.config.parallel, case.config.train
    model = p.pipeline_parallel_size * p.context_parallel_size * p.tensor_parallel_size
    if case.world_size % model:
        return  # dp does not exist; _world has said so
    dp = case.world_size // model
    unit = train.micro_batch_size * dp
    if train.global_batch_size % unit:
        yield (
            f"train.global_batch_size ({train.global_batch_size}) must be divisible by "
            f"train.micro_batch_size * dp = {train.micro_batch_size} * {dp} = {unit}: every "
            "replica takes whole micro-batches.\n  nearest train.global_batch_size: "
            f"{_nearest_multiples(train.global_batch_size, unit)}"
        )
    elif case.vpp > 1 and (train.global_batch_size // unit) % p.pipeline_parallel_size:
        yield (
            f"micro-batches of a step (train.global_batch_size / (micro_batch_size * dp) = "
            f"{train.global_batch_size // unit}) must be divisible by "
            f"parallel.pipeline_parallel_size ({p.pipeline_parallel_size}) with "
            "virtual_pipeline_parallel_size: the interleaved schedule runs them in rounds.\n"
            "  nearest train.global_batch_size: "
            f"{_nearest_multiples(train.global_batch_size, unit * p.pipeline_parallel_size)}"
        )


def _schedule(case: Case) -> Iterator[str]:
    optimizer, steps = case.config.optimizer, case.config.train.steps
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr ({optimizer.min_lr}) must be at most optimizer.lr ({optimizer.lr}): "
            "the schedule decays from lr to min_lr.\n"
            f"  largest optimizer.min_lr: {optimizer.lr}"
        )
    if steps and optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) must be less than train.steps "
            f"({steps}): otherwise the learning rate never reaches its peak.\n"
            f"  largest optimizer.warmup_steps: {steps - 1}"
        )


def _texts(case: Case) -> Iterator[str]:
    data = case.config.data
    if (data.path is None) == (data.domains is None):
        yield (
            "data.path or data.domains must be set, one of the two: a text, or several by name in "
            "given shares"
        )
        return
    if data.domains is not None and data.validation_path is not None:
        yield (
            "data.validation_path is for data.path.\n"
            "  set data.domains.NAME.validation_path, or data.validation_fraction"
        )
    paths = [data.validation_path, *(d.validation_path for d in (data.domains or {}).values())]
    if data.validation_fraction is not None and any(paths):
        yield (
            f"data.validation_fraction ({data.validation_fraction}) and a validation_path are two "
            "ways to hold text out.\n  leave out one of the two"
        )


def _mixing(case: Case) -> Iterator[str]:
    data, train = case.config.data, case.config.train
    try:
        starting_weights(data)
    except ConfigError as error:
        yield str(error)
    mixing, step_tokens = data.mixing, train.global_batch_size * data.seq_length
    if mixing.update == "never":
        return
    rule = f"data.mixing.update ({mixing.update})"
    if data.domains is None:
        yield f"{rule} needs data.domains: one text has no shares that could move"
        return
    if mixing.reference_losses is None:
        yield (
            f"{rule} needs data.mixing.reference_losses: weights follow the losses above them.\n"
            "  megatron-moe reference-loss CONFIG.yaml --out FILE evaluates the dense model"
        )
    judged = (data.validation_fraction, *(d.validation_path for d in data.domains.values()))
    if judged[0] is None and not all(judged[1:]):
        yield (
            f"{rule} needs held-out text of each domain.\n"
            "  set data.validation_fraction, or data.domains.NAME.validation_path for all"
        )
    if mixing.interval < step_tokens:
        yield (
            f"data.mixing.interval ({mixing.interval} tokens) must be at least the tokens of a "
            f"step, train.global_batch_size * data.seq_length = {step_tokens}: weights move "
            f"between steps.\n  smallest data.mixing.interval: {step_tokens}"
        )


def _reset_attention(case: Case) -> Iterator[str]:
    data, p, train = case.config.data, case.config.parallel, case.config.train
    if not data.reset_attention or case.config.run.device == "cpu":
        return
    for name, value in (
        ("parallel.context_parallel_size", p.context_parallel_size),
        ("train.micro_batch_size", train.micro_batch_size),
    ):
        if value > 1:
            yield (
                f"data.reset_attention (true) needs {name} (1), not ({value}), on CUDA: "
                "Transformer Engine takes packed documents as one row.\n  raise the number of "
                "micro-batches instead, or set run.device=cpu, where attention takes any"
            )


LAYOUT_RULES = (_world, _heads, _experts, _dense_ffn, _pipeline, _sequence, _batch)
"""Rules that another layout may keep."""

RULES = (
    _world, _heads, _experts, _capacity, _router, _construction, _shared_expert, _moe_layers,
    _dense_ffn, _pipeline,
    _sequence, _batch, _schedule, _texts, _mixing, _reset_attention, _tp_overlap,
)  # fmt: skip


def _indivisible(name: str, value: int, divisor_name: str, divisor: int, why: str) -> str:
    valid = ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)
    short = divisor_name.rpartition(".")[2]
    rule = f"{name} ({value}) must be divisible by {divisor_name} ({divisor}): {why}."
    return f"{rule}\n  valid {short}: {valid}"


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)
