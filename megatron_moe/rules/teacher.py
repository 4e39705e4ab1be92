"""Rules of a run with a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.train import Teacher
from megatron_moe.errors import UserError
from megatron_moe.experts.from_source import source_config
from megatron_moe.experts.methods import METHODS
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.rules import layout
from megatron_moe.rules.case import Case

_LAYOUT = (layout.heads, layout.experts, layout.dense_ffn, layout.pipeline)
"""Rules that the teacher must keep too, because it has the layout of the run."""


def teacher(case: Case) -> Iterator[str]:
    """Check that the teacher can teach what it is asked to, in the layout of the run."""
    settings = case.config.teacher
    if not settings.teaches:
        yield from _unused(settings)
        return
    if settings.teaches_layers:
        yield from _layers(case)
    if settings.router_weight:
        yield from _routers(case)
    if settings.logits_weight:
        yield from _logits(case)


def _unused(settings: Teacher) -> Iterator[str]:
    for name in ("path", "temperature", "steps"):
        value = getattr(settings, name)
        if value != Teacher.model_fields[name].default:
            yield (
                f"teacher.{name} ({value}) has no effect without a weight: there is no teacher.\n"
                "  set teacher.logits_weight, for example to 1, or remove the section teacher"
            )


def _layers(case: Case) -> Iterator[str]:
    """Check that each MoE layer has a dense FFN of the source to be compared with."""
    settings = case.config.teacher
    name = "layers_weight" if settings.layers_weight else "router_weight"
    rule = f"teacher.{name} ({getattr(settings, name)})"
    if settings.path is not None:
        yield (
            f"{rule} needs the source as the teacher, but teacher.path is {settings.path}: MoE "
            "layers are compared with the FFNs that they were made of.\n"
            f"  leave teacher.path unset, or set teacher.{name}=0 and teacher.logits_weight"
        )
    if case.spec.experts is not None:
        yield (
            f"{rule} needs a dense source, but {case.config.source.path} is a MoE model: its "
            f"layers have no dense FFN.\n  set teacher.{name}=0 and teacher.logits_weight"
        )


def _routers(case: Case) -> Iterator[str]:
    config = case.config
    rule = f"teacher.router_weight ({config.teacher.router_weight})"
    method, score = config.upcycle.method, config.moe.moe_router_score_function
    if not METHODS[method].sums_parts:
        parts = ", ".join(name for name, row in METHODS.items() if row.sums_parts)
        yield (
            f"{rule} needs experts that are different parts of the dense FFN, but upcycle.method "
            f"({method}) gives them the same neurons: there is nothing to prefer.\n"
            f"  set upcycle.method to one of {parts}, or set teacher.router_weight=0"
        )
    if score != "softmax":
        yield (
            f"{rule} needs moe.moe_router_score_function ({score}) to be softmax: the shares of "
            "the experts in the dense output are a distribution.\n"
            "  set teacher.router_weight=0, or moe.moe_router_score_function=softmax"
        )


def _logits(case: Case) -> Iterator[str]:
    """Check that the teacher has the vocabulary of the source and fits the layout of the run."""
    path, spec = case.config.teacher.path, case.spec
    if path is not None:
        try:
            spec = read_spec(path)
        except UserError as error:
            yield f"teacher.path ({path}) cannot be used: {error}"
            return
    if spec.vocab_size != case.spec.vocab_size:
        yield (
            f"teacher.path ({path}) has a vocabulary of {spec.vocab_size} tokens, but the source "
            f"has {case.spec.vocab_size}: their logits cannot be compared.\n"
            "  use a teacher with the tokenizer of the source, such as a larger model of its family"
        )
    if path is not None or spec.experts is not None:
        yield from _own_layout(case, spec)


def _own_layout(case: Case, spec: ModelSpec) -> Iterator[str]:
    own = Case(source_config(case.config, spec), spec, case.world_size)
    folder = case.config.teacher.path or case.config.source.path
    for rule in _LAYOUT:
        for message in rule(own):
            yield f"the teacher ({folder}) has the layout of the run. {message}"
