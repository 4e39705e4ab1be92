"""``megatron-moe flops``: count the parameters and FLOPs of a model or a configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moe.errors import ConfigError
from megatron_moe.experts.from_source import load_run
from megatron_moe.hf.known import model_named
from megatron_moe.hf.planned import spec_to_plan
from megatron_moe.hf.spec import read_spec, spec_from_config
from megatron_moe.planner.flops import ForwardFlops, forward_flops, training_flops
from megatron_moe.planner.parameters import active_parameters, total_parameters
from megatron_moe.planner.shape import MoeShape, run_shape, source_shape

DEFAULT_SEQUENCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCounts:
    """Parameters of a model, and FLOPs of one sequence."""

    sequence_length: int
    total_parameters: int
    active_parameters: int
    forward_flops: int
    """FLOPs of one sequence with full attention, including the output layer, without the router."""
    training_flops: int
    """Forward and backward FLOPs, counted like `forward_flops`."""
    causal_forward_flops: int
    """`forward_flops` with only the half of the attention scores that a causal model uses."""
    causal_training_flops: int
    """Forward and backward FLOPs, counted like `causal_forward_flops`."""
    forward_flops_by_part: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return asdict(self)


def count(path: Path, *, sequence_length: int | None = None) -> ModelCounts:
    """Count a Hugging Face folder, a known model, or the MoE of a run's YAML file.

    Args:
        path: The folder (a config.json is enough), its config.json, the name of a known model, or
            the YAML file of a run.
        sequence_length: Tokens of the sequence; None takes ``data.seq_length`` of a YAML file, or
            4096 otherwise.

    Raises:
        ConfigError, CheckpointError: ``path`` holds no model that can be counted.
    """
    if path.is_dir() or path.name == "config.json":
        folder = path if path.is_dir() else path.parent
        shape = source_shape(read_spec(folder))
        return count_shape(shape, sequence_length=sequence_length or DEFAULT_SEQUENCE)
    if not path.exists():
        if path.suffix in (".yaml", ".yml"):
            raise ConfigError(f"{path} is neither a Hugging Face folder nor a configuration file")
        model = model_named(str(path))
        shape = source_shape(spec_from_config(model.config, where=model.name))
        return count_shape(shape, sequence_length=sequence_length or DEFAULT_SEQUENCE)
    config = load_run(path)
    spec, _ = spec_to_plan(config.source.path)
    shape = run_shape(config, spec)
    return count_shape(
        shape,
        sequence_length=sequence_length or config.data.seq_length,
        padded_capacity_factor=config.moe.megatron_capacity_factor
        if config.moe.moe_pad_expert_input_to_capacity
        else None,
    )


def count_shape(
    shape: MoeShape, *, sequence_length: int, padded_capacity_factor: float | None = None
) -> ModelCounts:
    """Count a model on one sequence; padding appears only in the FLOPs by part."""
    full = forward_flops(
        shape, sequence_length=sequence_length, padded_capacity_factor=padded_capacity_factor
    )
    causal = forward_flops(shape, sequence_length=sequence_length, causal=True)
    return ModelCounts(
        sequence_length=sequence_length,
        total_parameters=total_parameters(shape),
        active_parameters=active_parameters(shape),
        forward_flops=full.model,
        training_flops=training_flops(full.model),
        causal_forward_flops=causal.model,
        causal_training_flops=training_flops(causal.model),
        forward_flops_by_part=_by_part(full),
    )


def _by_part(flops: ForwardFlops) -> dict[str, int]:
    parts = {name: getattr(flops, name) for name in ForwardFlops.__slots__}
    return {name: count for name, count in parts.items() if count or name != "adapters"}
