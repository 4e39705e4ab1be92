"""Check all rules of a configuration together, before any process group exists.

Each rule is a function of a `Case` that yields messages of the same form: the setting and its
value, the rule, the other setting and its value, the reason and, indented, the way out.
"""

from __future__ import annotations

from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.rules import layout, lora, moe, overlap, parts, precision, teacher, training
from megatron_moe.rules.case import Case
from megatron_moe.rules.nearest import changes, nearest_layout


def check(config: RunConfig, spec: ModelSpec, world_size: int) -> None:
    """Reject a configuration that cannot run.

    Raises:
        ConfigError: Lists all violated rules, with their values and the nearest valid values.
    """
    if messages := violations(config, spec, world_size):
        suggestion = legal_layout(config, spec, world_size)
        raise ConfigError("\n".join([*messages, *suggestion]))


def legal_layout(config: RunConfig, spec: ModelSpec, world_size: int) -> list[str]:
    """Return a line with the nearest layout that keeps all layout rules, or none if not needed."""
    before, nearest = config.parallel, nearest_legal(config, spec, world_size)
    if nearest is None and world_size == 1:  # there is but one layout, so it is not the cause
        return []
    if nearest is None:
        return [f"  no layout of {world_size} ranks is legal with the other settings"]
    if nearest is before:
        return []
    return [f"  nearest legal layout of {world_size} ranks: {changes(before, nearest)}"]


def nearest_legal(config: RunConfig, spec: ModelSpec, world_size: int) -> Parallel | None:
    """Return the nearest layout that keeps all rules of layouts; None if there is none.

    The configured layout itself is returned if it is legal. Rules that look at no degree are left
    out, because another layout does not help them.
    """

    def broken(parallel: Parallel) -> bool:
        case = Case(config.model_copy(update={"parallel": parallel}), spec, world_size)
        return any(True for rule in LAYOUT_RULES for _ in rule(case))

    if not broken(config.parallel):
        return config.parallel
    return nearest_layout(
        config.parallel,
        world_size=world_size,
        num_layers=spec.num_layers,
        is_legal=lambda parallel: not broken(parallel),
    )


def violations(config: RunConfig, spec: ModelSpec, world_size: int) -> list[str]:
    """Return the messages of all violated rules; an empty list means the configuration can run."""
    case = Case(config, spec, world_size)
    return [message for rule in RULES for message in rule(case)]


LAYOUT_RULES = (
    layout.world, layout.heads, layout.experts, layout.dense_ffn,
    layout.pipeline, layout.pipeline_layout, layout.sequence, layout.batch, layout.batch_ramp,
    lora.whole_experts, layout.expert_overlap,
)  # fmt: skip
"""Rules that another layout can satisfy."""

RULES = (
    *LAYOUT_RULES, layout.tp_overlap, precision.fp8,
    overlap.shared_experts, overlap.expert_exchange, overlap.weight_gradients,
    moe.capacity, moe.dispatcher, moe.router, moe.construction,
    moe.shared_expert, moe.moe_layers,
    training.schedule, training.weight_decay, training.gradients, training.muon, training.moments,
    parts.roles, parts.stages, lora.adapters, lora.alone, teacher.teacher,
    training.texts, training.mixing, training.context, training.recompute, training.reset_attention,
    training.device_check, training.local_copies,
)  # fmt: skip
