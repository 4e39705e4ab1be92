"""Choose the settings of a run that has no configuration yet, from a model and a token budget.

Schedule and experts are those of arXiv 2412.09952 (Llama-3-8B as 8 experts, top-2, on 100B tokens);
batches are those of the files in configs/h100. The layout is not chosen here: `search.py` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.experts.from_source import settings_of
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.parameters import active_parameters
from megatron_moe.planner.shape import source_shape

CPU = "cpu"
"""Value of ``--gpu`` for a run on this machine without a GPU."""

PEAK_LR, LAST_LR, WARMUP_STEPS = 3e-5, 3e-7, 100
"""Schedule of arXiv 2412.09952: cosine decay after a linear warm-up."""

STEP_TOKENS = ((0.6e9, 2**17), (2e9, 2**18), (6e9, 2**19), (30e9, 2**21), (math.inf, 2**23))
"""Tokens of one step for source models of fewer than so many active parameters."""

LONG_FROM = 6e9
"""Active parameters from which sequences have 8192 tokens instead of 4096."""

MIN_STEPS = 100
"""Number of steps that a small budget is divided into, so that the schedule has a shape."""

CPU_SEQUENCE, CPU_BATCH, CPU_STEPS = 128, 4, 20
"""Size of a run without a GPU, as in configs/demo.yaml: minutes, not days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Facts that a user states about a new run."""

    source: Path
    gpus: int = 8
    gpu: str = "h100"
    """A GPU of `hardware.GPUS`, or `CPU`."""
    experts: int | None = None
    """Experts per layer. None: 8, or those of a MoE source, which cannot have others."""
    topk: int | None = None
    """Experts per token. None: 2, or those of a MoE source."""
    tokens: int | None = None
    """Tokens to train on. None: 100 billion, or a few steps without a GPU."""
    sequence_length: int | None = None
    """Tokens of a sequence. None: by the size of the model."""
    engine: str = "auto"
    data: Path = Path("data/train")
    run_dir: Path = Path("runs/new")

    @property
    def on_cpu(self) -> bool:
        """Whether the run has no GPU."""
        return self.gpu == CPU


DENSE_EXPERTS, DENSE_TOPK = 8, 2
"""Experts that a dense model gets by default."""
DEFAULT_TOKENS = 100_000_000_000


def starting_config(request: Request, spec: ModelSpec) -> RunConfig:
    """Return a configuration with everything but a layout, which is that of one rank.

    Raises:
        ConfigError: A value is not valid by itself, such as 0 experts, or contradicts the source.
    """
    moe, upcycle = _experts(request, spec)
    length = _sequence_length(request, spec)
    batch = _global_batch(request, spec, length)
    steps = _steps(request, batch * length)
    tree: dict[str, Any] = {
        "run": {"dir": str(request.run_dir), "engine": request.engine},
        "source": {"path": str(request.source)},
        "moe": moe,
        "upcycle": upcycle,
        "data": {"path": str(request.data), "seq_length": length},
        "train": {"steps": steps, "global_batch_size": batch},
        "optimizer": {
            "lr": PEAK_LR, "min_lr": LAST_LR, "warmup_steps": min(WARMUP_STEPS, steps // 5),
        },
    }  # fmt: skip
    if request.on_cpu:
        tree["run"] |= {"device": "cpu", "engine": "auto"}
        tree["train"] |= {"precision": "fp32"}
        tree["parallel"] = {"expert_parallel_size": math.gcd(moe["num_moe_experts"], request.gpus)}
    return build(RunConfig, tree)


def _experts(request: Request, spec: ModelSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sections moe and upcycle: new experts, or those of a MoE source as they are."""
    if spec.experts is None:
        experts, topk = request.experts or DENSE_EXPERTS, request.topk or DENSE_TOPK
        return {"num_moe_experts": experts, "moe_router_topk": topk}, {}
    for option in ("experts", "topk"):
        if (value := getattr(request, option)) is not None:
            raise ConfigError(
                f"--{option} ({value}) is for dense models: {request.source.name} is a MoE, which "
                f"init continues as it is.\n  leave --{option} out, and change upcycle.method in "
                "the file to grow or prune it (docs/growing.md)"
            )
    return settings_of(spec.experts, spec.num_layers), {"method": "keep"}


def name_of(spec: ModelSpec, experts: int | None, topk: int | None) -> str:
    """Return the last part of the usual name of a run: ``e8t2``, or ``keep`` for a MoE source."""
    if spec.experts is not None:
        return "keep"
    return f"e{experts or DENSE_EXPERTS}t{topk or DENSE_TOPK}"


def source_parameters(spec: ModelSpec) -> int:
    """Return the number of weights of the source model that a token uses."""
    return active_parameters(source_shape(spec))


def _sequence_length(request: Request, spec: ModelSpec) -> int:
    if request.sequence_length is not None:
        return request.sequence_length
    usual = 8192 if source_parameters(spec) >= LONG_FROM else 4096
    windows = [window for window in spec.attention_windows if window is not None]
    longest = min([spec.max_position_embeddings, *windows])
    return min(CPU_SEQUENCE if request.on_cpu else usual, longest)


def _global_batch(request: Request, spec: ModelSpec, length: int) -> int:
    """Return the sequences of a step: at least one per GPU, and by the size of the model.

    It is a power of two times the odd factor of the number of GPUs, so that most layouts divide it.
    """
    odd = request.gpus // (request.gpus & -request.gpus)
    if request.on_cpu:
        return request.gpus * -(-CPU_BATCH // request.gpus)
    parameters = source_parameters(spec)
    tokens = next(tokens for limit, tokens in STEP_TOKENS if parameters < limit)
    budget = DEFAULT_TOKENS if request.tokens is None else request.tokens
    sequences = max(request.gpus, min(tokens, budget // MIN_STEPS) // length) // odd
    return odd * 2 ** (sequences.bit_length() - 1)


def _steps(request: Request, step_tokens: int) -> int:
    if request.tokens is None and request.on_cpu:
        return CPU_STEPS
    tokens = DEFAULT_TOKENS if request.tokens is None else request.tokens
    return max(1, -(-tokens // step_tokens))
