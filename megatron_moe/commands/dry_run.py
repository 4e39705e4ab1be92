"""The story of ``train --dry-run``: build one rank of a job before the job is queued.

Every object is the one that training makes: the groups, the model, the walk of upcycling over its
parameters, gradient buffers and the optimizer. Only numbers are missing (``runtime/stand_in.py``),
so it takes seconds on a laptop for any world size. The planner's arithmetic is shown beside what
was counted; a difference is a bug in one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_moe.checkpoint.moments import parts
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.hf.unread import open_unread
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.upcycle import Filled, fill
from megatron_moe.parallel.groups import create_groups
from megatron_moe.parallel.layout import ParallelLayout, local_experts
from megatron_moe.planner.by_matrix import muon_state
from megatron_moe.planner.memory import (
    ModelState,
    RankMemory,
    model_state,
    rank_memory,
)
from megatron_moe.planner.parameters import total_parameters
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.teacher import with_teacher
from megatron_moe.planner.workload import Degrees, degrees_of, state_precision, workload_of
from megatron_moe.runtime.engine import (
    TORCH_ON_CUDA,
    TRANSFORMER_ENGINE,
    Engine,
    choose_engine,
    installed_version,
)
from megatron_moe.runtime.stand_in import META, simulated_rank
from megatron_moe.train.optimizers import element_bytes
from megatron_moe.train.state import TrainState, make_state

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """State, reads and memory of one rank."""

    rank: int
    degrees: Degrees
    layer_spec: str
    groups: dict[str, list[int]]
    """Ranks of each group this rank is in."""
    layers: list[list[int]]
    """Global ids of the layers of each model chunk."""
    experts: list[int]
    """Global ids of the experts it holds of each MoE layer."""
    parameters: int
    filled: Filled
    """Parameters and bytes that upcycling would fill on this rank."""
    source_bytes: int
    """Size of the whole dense checkpoint."""
    counted: ModelState
    """Bytes of the real buffers and optimizer."""
    planned: ModelState
    """Bytes of the same buffers by the planner's arithmetic."""
    memory: RankMemory
    """The counted state, and the planner's estimate of what comes and goes in a step."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "rank": self.rank,
            "world_size": self.degrees.gpus,
            "layout": self.degrees.to_json(),
            "layer_spec": self.layer_spec,
            "groups": self.groups,
            "layers": self.layers,
            "experts": self.experts,
            "parameters": self.parameters,
            "parameter_bytes": self.filled.parameter_bytes,
            "read_bytes": self.filled.bytes_read,
            "read_tensors": len(self.filled.sources),
            "checkpoint_bytes": self.source_bytes,
            "state_bytes": self.counted.to_json(),
            "planned_state_bytes": self.planned.to_json(),
            "memory_gib": self.memory.to_json(),
        }


def dry_run(config: RunConfig, *, rank: int, world_size: int) -> DryRun:
    """Build ``rank`` of ``world_size`` ranks; `rules.check` has accepted the configuration.

    A configuration for ``run.device: cpu`` is built as it trains there. Any other is built as it
    trains on CUDA, but for the layers where Transformer Engine is not installed; the torch-native
    ones have the same parameters.

    Raises:
        ConfigError: There is no such rank.
    """
    if rank >= world_size:
        raise ConfigError(f"--rank ({rank}) must be less than --world-size ({world_size})")
    engine = built_engine(config)
    config = _buildable(config, engine)
    folders = [config.source.path, *config.upcycle.mix_with]
    dense = [open_unread(folder) for folder in folders]  # 1. headers, or the promise of config.json
    spec = dense[0].spec
    plan = sized_plan(make_expert_plan(spec, config.moe, config.upcycle))  # 2. how many neurons
    with simulated_rank(rank, world_size=world_size):
        layout, groups = create_groups(config.parallel, seed=config.run.seed)  # 3. who holds what
        with META:  # 4. this rank's chunks
            model = build_model(
                config, spec, layout=layout, groups=groups, rank=rank, engine=engine
            )
        filled, _ = fill(model, dense, plan, layout=layout, rank=rank)  # 5. what it would read
        with META:  # 6. gradient buffers, optimizer
            state = make_state(config, model, groups, step=largest_stage(config, spec))
        source_bytes = sum(checkpoint.source_bytes for checkpoint in dense)
        return _report(config, spec, layout, groups, state, filled, source_bytes)


def largest_stage(config: RunConfig, spec: ModelSpec) -> int:
    """Return the number of steps before the stage that trains the most parameters."""
    shape = run_shape(config, spec)
    return max(
        config.train.stage_starts(),
        key=lambda step: total_parameters(shape, frozen=config.frozen_after(step)),
    )


def sized_plan(plan: ExpertPlan) -> ExpertPlan:
    """``plan`` as it is, or with any neurons where finding the right ones takes the source.

    How many bytes are read depends on how many neurons an expert has, not on which. With copies of
    the experts of a MoE it also depends on how often each is copied: here as evenly as possible.
    """
    recipe = plan.recipe
    if plan.needs == "nothing":
        return plan
    expert_E, largest = None, recipe.dense_ffn_hidden_size
    if recipe.source_experts:  # its shared expert is taken as it is
        largest = recipe.shared_size
        expert_E = np.arange(recipe.num_experts) * recipe.source_experts // recipe.num_experts
    generator = np.random.default_rng(0)
    every = [generator.permutation(recipe.dense_ffn_hidden_size) for _ in range(recipe.num_experts)]
    table = LayerTable(
        neurons_EM=np.stack([order_F[: recipe.expert_ffn_hidden_size] for order_F in every]),
        shared_S=generator.permutation(largest)[: recipe.shared_size],
        expert_E=expert_E,
        **_any_merge(plan),
        router_ED=np.zeros((recipe.num_experts, recipe.hidden_size), dtype=np.float32),
        output_scale=1.0,
    )
    return plan.with_tables(dict.fromkeys(recipe.moe_layers, table))


def _any_merge(plan: ExpertPlan) -> dict[str, Any]:
    """Return a table's values for merged experts, of groups of equal size as far as possible."""
    recipe = plan.recipe
    if recipe.choose != "merge":
        return {}
    experts, size = recipe.source_experts, recipe.dense_ffn_hidden_size
    into_O = np.arange(experts) * recipe.num_experts // experts
    return {
        "into_O": into_O,
        "weight_O": 1.0 / np.bincount(into_O)[into_O],
        "order_OM": np.broadcast_to(np.arange(size)[::-1], (experts, size)),
    }


def _report(
    config: RunConfig,
    spec: ModelSpec,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    state: TrainState,
    filled: Filled,
    source_bytes: int,
) -> DryRun:
    rank, model = dist.get_rank(), state.model
    degrees = degrees_of(config, gpus=dist.get_world_size())
    counted = state_bytes(state)
    return DryRun(
        rank=rank,
        degrees=degrees,
        layer_spec=_layer_spec(config),
        groups=_members(groups),
        layers=[list(chunk.layers) for chunk in model.chunks],
        experts=list(local_experts(layout, rank=rank, num_experts=config.moe.num_moe_experts)),
        parameters=_count(model),
        filled=filled,
        source_bytes=source_bytes,
        counted=counted,
        planned=planned_bytes(config, spec, layout, rank=rank),
        memory=rank_memory(
            run_shape(config, spec),
            with_teacher(workload_of(config), config, spec),
            degrees,
            pp_rank=layout.attention.coords(rank)["pp"],
            state=counted,
        ),
    )


def state_bytes(state: TrainState) -> ModelState:
    """Bytes of Megatron-Core's buffers, and of master weights and moments of this rank."""
    chunks: Any = state.wrapped
    buffers = [b for chunk in chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    weights = sum(p.numel() * p.element_size() for m in state.model.modules for p in m.parameters())
    if all(buffer.param_data is not None for buffer in buffers):  # padded, as the optimizer wants
        weights = sum(b.param_data.numel() * b.param_data.element_size() for b in buffers)
        parameters = [p for m in state.model.modules for p in m.parameters()]
        weights += sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    master = 4 if state.model.transformer.bf16 else 0
    optimizer = host = 0
    for part in parts(state.optimizer):
        held = sum(p.numel() for group in part.param_groups for p in group["params"])
        on_device, on_host = element_bytes(part) if held else (0, 0)
        optimizer += held * (master + on_device)
        host += held * on_host
    return ModelState(
        weights=weights,
        gradients=sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        optimizer=optimizer,
        host=host,
    )


def planned_bytes(
    config: RunConfig, spec: ModelSpec, layout: ParallelLayout, *, rank: int
) -> ModelState:
    """The planner's figures for the same rank."""
    attention, experts = layout.attention.coords(rank), layout.experts.coords(rank)
    degrees = degrees_of(config, gpus=dist.get_world_size())
    overlaps = config.train.overlap_grad_reduce
    shape = run_shape(config, spec)
    common: dict[str, Any] = {
        "pp_rank": attention["pp"],
        "weight_bytes": 2 if config.train.precision == "bf16" else 4,
        "replica": attention["dp"] * layout.attention.size("cp") + attention["cp"],
        "expert_replica": experts["edp"],
        "precision": state_precision(config),
        "frozen": config.frozen_after(largest_stage(config, spec)),
    }
    sharded = config.optimizer.use_distributed_optimizer
    if config.optimizer.optimizer == "muon":
        return muon_state(shape, degrees, sharded=sharded, **common)
    # Megatron-Core's default, in force where gradients are reduced during the backward pass.
    bucket_size = max(40_000_000, 1_000_000 * degrees.dp) if overlaps else None
    return model_state(
        shape, degrees, distributed_optimizer=sharded, bucket_size=bucket_size, **common
    )


def _count(model: Model) -> int:
    return sum(p.numel() for module in model.modules for p in module.parameters())


def _members(groups: ProcessGroupCollection) -> dict[str, list[int]]:
    named = {
        "tp": groups.tp, "cp": groups.cp, "dp": groups.dp, "pp": groups.pp,
        "etp": groups.expt_tp, "ep": groups.ep, "edp": groups.expt_dp,
    }  # fmt: skip
    return {name: dist.get_process_group_ranks(group) for name, group in named.items()}


def built_engine(config: RunConfig) -> Engine:
    """Return the engine whose layers are built: the run's where this machine has it.

    A machine without a GPU builds those for CUDA as well. Transformer Engine's can be built only
    where it is installed; the torch-native ones have the same parameters.
    """
    if config.run.device == "cpu":
        return choose_engine(config.run.engine, device="cpu", problem=lambda: None)
    if config.run.engine == "torch" or installed_version() is None:
        return TORCH_ON_CUDA
    return TRANSFORMER_ENGINE


def _buildable(config: RunConfig, engine: Engine) -> RunConfig:
    """Return the configuration without recomputation that only another engine has.

    A machine without Transformer Engine builds its layers by the torch engine, and recomputation
    changes no parameter.
    """
    if not engine.is_torch or config.train.recompute != "selective":
        return config
    train = config.train.model_copy(update={"recompute": "none"})
    return config.model_copy(update={"train": train})


def _layer_spec(config: RunConfig) -> str:
    engine = built_engine(config)
    if not engine.on_cuda:
        return "torch-native (run.device is cpu)"
    if not engine.is_torch:
        return "Transformer Engine"
    if config.run.engine == "torch":
        return "torch-native (run.engine is torch)"
    return (
        "torch-native, because Transformer Engine is not installed here; its parameters are "
        "equal, and activations are predicted for Transformer Engine"
    )


# ---- for people ----------------------------------------------------------------------------------


def dry_run_report(result: DryRun) -> RenderableType:
    """The rank's groups, what it holds and what it needs, as tables."""
    shards = f"{_gib(result.filled.bytes_read)} of {_gib(result.source_bytes)} GiB"
    lines = [
        f"rank {result.rank} of {result.degrees.gpus}: {result.degrees}",
        f"layers {'; '.join(_run(chunk) for chunk in result.layers)}, of each MoE layer experts "
        f"{_run(result.experts)}; {result.layer_spec}",
        f"{result.parameters:,} parameters; reads {shards} of the dense checkpoint, from "
        f"{len(result.filled.sources)} tensors",
    ]
    return Group(
        *map(Text, lines), _groups_table(result), _state_table(result), _memory_table(result)
    )


def _groups_table(result: DryRun) -> Table:
    table = Table("group", "size", "place", "ranks")
    for name, ranks in result.groups.items():
        place = ranks.index(result.rank)
        table.add_row(name, str(len(ranks)), str(place), _run(ranks))
    return table


def _state_table(result: DryRun) -> Table:
    table = Table("lives for the whole run", "bytes", "the planner's bytes")
    planned = result.planned.to_json()
    for name, counted in result.counted.to_json().items():
        table.add_row(name, f"{counted:,}", f"{planned.get(name, 0):,}")
    return table


def _memory_table(result: DryRun) -> Table:
    table = Table("at the peak of a step", "GiB")
    for name, gib in result.memory.to_json().items():
        table.add_row(name, f"{gib:.2f}")
    return table


def _run(numbers: list[int]) -> str:
    """Evenly spaced numbers in few words.

    >>> _run([3]), _run([0, 1, 2]), _run([4, 12, 20, 28])
    ('3', '0-2', '4, 12 .. 28')
    """
    if len(numbers) < 3:
        return ", ".join(map(str, numbers))
    first, second, last = numbers[0], numbers[1], numbers[-1]
    return f"{first}-{last}" if second - first == 1 else f"{first}, {second} .. {last}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
