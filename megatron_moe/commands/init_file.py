"""Format the YAML file of a new run, with a comment on each choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.parameters import active_parameters, total_parameters
from megatron_moe.planner.run_table import amount, duration, size
from megatron_moe.planner.search import Candidate
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.starting import Request, source_parameters
from megatron_moe.planner.whole_run import WholeRun


@dataclass(frozen=True, slots=True)
class Draft:
    """A new run: its settings and the prediction that they were chosen by."""

    config: RunConfig
    candidate: Candidate | None
    """The predicted layout; None without a GPU, which the planner does not model."""
    whole: WholeRun | None
    """The predicted run; None without a GPU."""


def as_yaml(draft: Draft, request: Request, spec: ModelSpec, commands: list[str]) -> str:
    """Return the YAML file of a draft, with comments."""
    lines = [f"# {line}".rstrip() for line in _head(draft, request, spec)]
    lines += ["# Next:", *(f"#   {command}" for command in commands)]
    for section, settings in _sections(draft, request):
        lines.append(f"{section}:")
        lines += [_line(name, value, comment) for name, value, comment in settings]
    return "\n".join(lines) + "\n"


def _line(name: str, value: object, comment: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    setting = f"  {name}: {text}"
    return f"{setting:<44}# {comment}" if comment else setting


def _head(draft: Draft, request: Request, spec: ModelSpec) -> Iterator[str]:
    config, shape = draft.config, run_shape(draft.config, spec)
    kept = spec.experts is not None
    of_source = "" if kept else f" ({amount(source_parameters(spec))} parameters)"
    yield (
        f"{request.source.name}{of_source} {'with its' if kept else 'as'} "
        f"{config.moe.num_moe_experts} experts, top-{config.moe.moe_router_topk}: "
        f"{amount(total_parameters(shape))} parameters,"
    )
    active = amount(active_parameters(shape))
    yield f"{active} of them active for a token. Written by megatron-moe init."
    if draft.candidate is None or draft.whole is None:
        return
    time, memory, usable = (
        draft.candidate.time, draft.candidate.memory, gpu_named(request.gpu).usable_gib,
    )  # fmt: skip
    yield (
        f"Predicted on {request.gpus} {request.gpu}: {time.tokens_per_second_per_gpu:,.0f} "
        f"tokens/s per GPU ({time.mfu:.1f}% MFU, causal),"
    )
    yield (
        f"{duration(draft.whole.hours)} for {amount(draft.whole.tokens)} tokens, "
        f"{memory.total:.1f} of {usable:.1f} GiB per GPU, {size(draft.whole.disk_bytes)} of disk."
    )


Setting = tuple[str, object, str]


def _sections(draft: Draft, request: Request) -> Iterator[tuple[str, list[Setting]]]:
    config = draft.config
    yield "run", list(_run_settings(config, request))
    yield "source", [("path", str(config.source.path), "")]
    balance = ("moe_aux_loss_coeff", config.moe.moe_aux_loss_coeff, "keeps experts evenly used")
    if config.upcycle.method == "keep":
        yield "moe", [balance]
        yield "upcycle", [("method", "keep", "the source as it is, experts and router included")]
    else:
        yield (
            "moe",
            [
                ("num_moe_experts", config.moe.num_moe_experts, ""),
                ("moe_router_topk", config.moe.moe_router_topk, "experts per token"),
                balance,
            ],
        )
        yield "upcycle", [("method", "copy", "equals the dense model at step 0")]
    if degrees := list(_degrees(config)):
        yield "parallel", degrees
    yield (
        "data",
        [
            ("path", str(config.data.path), "text, JSONL, or the prefix of a .bin/.idx pair"),
            ("seq_length", config.data.seq_length, "tokens"),
        ],
    )
    yield "train", list(_train_settings(config, draft.whole))
    optimizer = config.optimizer
    yield (
        "optimizer",
        [
            ("lr", optimizer.lr, "arXiv 2412.09952: cosine decay after a linear warm-up"),
            ("min_lr", optimizer.min_lr, ""),
            ("warmup_steps", optimizer.warmup_steps, ""),
        ],
    )
    yield (
        "checkpoint",
        [
            ("interval", config.checkpoint.interval, _interval(draft.whole)),
            ("keep", config.checkpoint.keep, ""),
        ],
    )


def _interval(whole: WholeRun | None) -> str:
    if whole is None:
        return "steps"
    every = whole.interval * whole.step_hours / max(1, whole.steps)
    return f"steps: {duration(every)}, by Daly; {size(whole.checkpoint_bytes)} each"


def _run_settings(config: RunConfig, request: Request) -> Iterator[Setting]:
    yield "dir", str(config.run.dir), ""
    if request.on_cpu:
        yield "device", "cpu", ""
        return
    meaning = {
        "auto": "Transformer Engine if installed; the layout fits with either",
        "transformer_engine": "required: memory was predicted for it",
        "torch": "torch's kernels; Transformer Engine is faster",
    }
    yield "engine", config.run.engine, meaning[config.run.engine]


def _degrees(config: RunConfig) -> Iterator[Setting]:
    meaning = {
        "tensor_parallel_size": "ranks that share attention heads (tp)",
        "context_parallel_size": "ranks that share a sequence (cp)",
        "pipeline_parallel_size": "stages of consecutive layers (pp)",
        "virtual_pipeline_parallel_size": "interleaved chunks per stage (vpp)",
        "expert_parallel_size": "ranks that share the experts of a layer (ep)",
        "expert_tensor_parallel_size": "ranks that share an expert (etp)",
    }
    for name, comment in meaning.items():
        value = getattr(config.parallel, name)
        if value not in (None, 1):
            yield name, value, comment


def _train_settings(config: RunConfig, whole: WholeRun | None) -> Iterator[Setting]:
    train = config.train
    tokens = train.steps * train.global_batch_size * config.data.seq_length
    yield "steps", train.steps, f"{amount(tokens)} tokens"
    yield "micro_batch_size", train.micro_batch_size, "sequences that a replica processes at once"
    step = train.global_batch_size * config.data.seq_length
    yield "global_batch_size", train.global_batch_size, f"sequences, {amount(step)} tokens per step"
    yield "precision", train.precision, ""
    if train.recompute != "none":
        yield "recompute", train.recompute, "needed to fit"
