"""Every rule a configuration must keep, checked together before any process group exists.

Each rule is one function over a `Case` and yields messages of one form: the setting and its value,
the rule, the other setting and its value, why the rule exists, and, indented, the way out.
"""

from __future__ import annotations

from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import DenseSpec
from megatron_moe.parallel import layout_rules, moe_rules, training_rules
from megatron_moe.parallel.case import Case
from megatron_moe.parallel.nearest import changes, nearest_layout


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


LAYOUT_RULES = (
    layout_rules.world, layout_rules.heads, layout_rules.experts, layout_rules.dense_ffn,
    layout_rules.pipeline, layout_rules.sequence, layout_rules.batch,
)  # fmt: skip
"""Rules that another layout may keep."""

RULES = (
    *LAYOUT_RULES, layout_rules.tp_overlap,
    moe_rules.capacity, moe_rules.dispatcher, moe_rules.router, moe_rules.construction,
    moe_rules.shared_expert, moe_rules.moe_layers,
    training_rules.schedule, training_rules.texts, training_rules.mixing,
    training_rules.recompute, training_rules.reset_attention,
)  # fmt: skip
