"""Take settings of MoE layers from a MoE source: what is left out, and what the source computes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_moe.config.judging import dense_config
from megatron_moe.config.load import load
from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.experts.methods import METHODS
from megatron_moe.hf.moe_spec import ExpertsSpec
from megatron_moe.hf.planned import missing_but_known
from megatron_moe.hf.spec import ModelSpec, read_spec, spec_from_config

_LAYERS = ("moe_layers", "first_dense_layers", "last_dense_layers")


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read the configuration of a run, with the settings that follow from a MoE source.

    Raises:
        ConfigError: See `config.load.load`.
        CheckpointError: The source has a config.json that cannot be used.
    """
    return load(RunConfig, path, overrides or [], complete=complete_from_source)


def complete_from_source(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose section ``moe`` has what it leaves out from a MoE source.

    Unchanged if the source is dense, or there is none, which is reported later. The number of
    experts is not taken from the source for methods that change it.

    Raises:
        CheckpointError: The source has a config.json that cannot be used.
    """
    spec = _source_spec(tree)
    moe = tree.get("moe") or {}
    if spec is None or spec.experts is None or not isinstance(moe, dict):
        return tree
    upcycle = tree.get("upcycle") or {}
    values = settings_of(spec.experts, spec.num_layers)
    method = METHODS.get(upcycle.get("method", "copy"))
    splits = method is not None and method.splits_experts
    if splits or upcycle.get("method") in ("grow", "prune"):
        del values["num_moe_experts"]
    if any(name in moe for name in _LAYERS):
        del values["moe_layers"]
    if isinstance(moe.get("num_moe_experts"), int):
        count = copies(moe["num_moe_experts"], spec.experts)
        if splits or upcycle.get("twins") == "exact":
            values["moe_router_topk"] *= count
        if splits:
            values["moe_ffn_hidden_size"] //= count
    return {**tree, "moe": {**values, **moe}}


def settings_of(experts: ExpertsSpec, num_layers: int) -> dict[str, Any]:
    """Return the settings of ``moe`` that describe the MoE layers of a source."""
    values = {field.name: getattr(experts, field.name) for field in fields(experts)}
    layers = list(experts.moe_layers)
    values["moe_layers"] = "all" if len(layers) == num_layers else layers
    return values


def copies(num_moe_experts: int, experts: ExpertsSpec) -> int:
    """Return the number of copies of each expert with method grow, or of parts; at least 1."""
    return max(num_moe_experts // experts.num_moe_experts, 1)


def source_config(config: RunConfig, spec: ModelSpec) -> RunConfig:
    """Return the configuration of the source model itself, with one sequence per micro-batch."""
    result = dense_config(config)
    if spec.experts is None:
        return result
    moe = Moe(**settings_of(spec.experts, spec.num_layers), moe_router_load_balancing_type="none")
    return result.model_copy(update={"moe": moe, "upcycle": Upcycle(method="keep")})


def divides_source(config: RunConfig, spec: ModelSpec) -> bool:
    """Return whether the layout of the run can also hold the source model."""
    ep = config.parallel.expert_parallel_size
    return spec.experts is None or spec.experts.num_moe_experts % ep == 0


def check_ep(config: RunConfig, spec: ModelSpec) -> None:
    """Reject a layout that cannot hold the source model.

    Raises:
        ConfigError: ep does not divide the source's experts.
    """
    if spec.experts is not None and not divides_source(config, spec):
        raise ConfigError(
            f"parallel.expert_parallel_size ({config.parallel.expert_parallel_size}) must divide "
            f"the source's {spec.experts.num_moe_experts} experts to measure them: each ep rank "
            "holds whole experts.\n  set parallel.expert_parallel_size for this command alone"
        )


def _source_spec(tree: dict[str, Any]) -> ModelSpec | None:
    """Read the shape of the source, or of the copy of its config.json that a run keeps."""
    source, run = (tree.get(name) for name in ("source", "run"))
    folders = []
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        folders.append(Path(source["path"]).expanduser())
    if isinstance(run, dict) and isinstance(run.get("dir"), str):
        folders.append(Path(run["dir"]).expanduser() / "source")
    for folder in folders:
        if (folder / "config.json").exists():
            return read_spec(folder)
    # For planning before anything is downloaded; a run reports later that the folder is missing.
    known = [model for folder in folders[:1] if (model := missing_but_known(folder))]
    return spec_from_config(known[0].config, where=known[0].name) if known else None
