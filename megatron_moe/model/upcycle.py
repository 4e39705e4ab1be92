"""Online upcycling: fill this rank's parameters from the dense checkpoint, in place.

For every local parameter, the name table says what it is made of, the plan which neurons an expert
takes, and ``parallel/shards.py`` which slices are this rank's. These slices are read straight into
the parameter. There is no dense model, no full tensor, no second copy and no broadcast. Loading is
total: each parameter is filled exactly once by one rule, and over all ranks each tensor of the
checkpoint is used, or the run stops and lists what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import ExpertPlan, LayerPlan
from megatron_moe.hf.names import ROW_OF_ROLE, Match, dense_tensors, match
from megatron_moe.hf.reader import DenseCheckpoint
from megatron_moe.model.build import Chunk, Model
from megatron_moe.parallel.layout import ParallelLayout, local_experts
from megatron_moe.parallel.shards import Part, Piece, pieces


@dataclass(frozen=True, slots=True)
class Filled:
    """What upcycling did on this rank."""

    parameters: int
    """Local parameters, each filled exactly once."""
    parameter_bytes: int
    bytes_read: int
    """Bytes asked of the checkpoint; slices that several experts share are read once."""
    sources: frozenset[str]
    """Tensors of the checkpoint this rank read from."""


@dataclass(slots=True)
class _Filler:
    """Reads pieces into parameters, each distinct piece of a layer once."""

    dense: DenseCheckpoint
    sources: set[str] = field(default_factory=set)
    seen: dict[tuple, Tensor] = field(default_factory=dict)

    def fill(self, parameter: Tensor, parts: list[Piece]) -> None:
        for piece in parts:
            target = parameter[piece.into]
            if (again := self.seen.get(piece.key)) is not None:
                target.copy_(again)
            else:
                self.dense.read_into(piece.source, target, rows=piece.rows, columns=piece.columns)
                self.seen[piece.key] = target
            self.sources.add(piece.source)


@torch.no_grad()
def upcycle(
    model: Model,
    dense: DenseCheckpoint,
    plan: ExpertPlan,
    *,
    layout: ParallelLayout,
    rank: int,
) -> Filled:
    """Fill every parameter of ``model`` on this rank.

    Args:
        model: Freshly built; its parameters hold nothing.
        dense: The checkpoint; its tensors were checked against its config.
        plan: Which neurons go to which expert.
        layout: Who holds what.
        rank: This rank.

    Raises:
        CheckpointError: A parameter that no rule fills, or NaN or Inf in a tensor.
    """
    filler = _Filler(dense)
    before, count, size = dense.bytes_read, 0, 0
    for chunk in model.chunks:
        for layer, parameters in _by_layer(chunk):
            layer_plan = plan.layer(layer) if layer in plan.moe_layers else None
            filler.seen.clear()
            for parameter, found in parameters:
                _fill_one(parameter, found, layer, layer_plan, filler, layout, rank)
                count += 1
                size += parameter.numel() * parameter.element_size()
    filler.seen.clear()
    return Filled(count, size, dense.bytes_read - before, frozenset(filler.sources))


def check_coverage(filled: Filled, dense: DenseCheckpoint) -> int:
    """How many tensors the ranks used together: all of them.

    Raises:
        CheckpointError: Some tensor of the dense model reached no rank; on every rank.
    """
    gathered: list[frozenset[str]] = [frozenset()] * dist.get_world_size()
    dist.all_gather_object(gathered, filled.sources)
    expected = {name for name, _ in dense_tensors(dense.spec)}
    used = frozenset().union(*gathered)
    if unused := sorted(expected - used):
        listed = "\n".join(f"    {name}" for name in unused)
        raise CheckpointError(f"{len(unused)} tensors of the checkpoint reached no rank:\n{listed}")
    return len(used)


def _by_layer(chunk: Chunk) -> Iterator[tuple[int | None, list[tuple[Tensor, Match]]]]:
    """The chunk's parameters with their rules, layer after layer; None is outside the layers."""
    groups: dict[int | None, list[tuple[Tensor, Match]]] = {}
    unknown = []
    for name, parameter in chunk.module.named_parameters():
        found = match(name)
        if found is None:
            unknown.append(name)
            continue
        layer = None if found.layer is None else chunk.layers[found.layer]
        groups.setdefault(layer, []).append((parameter, found))
    if unknown:
        listed = "\n".join(f"    {name}" for name in unknown)
        raise CheckpointError(
            f"{len(unknown)} local parameters have no source in the checkpoint:\n{listed}"
        )
    yield from groups.items()


def _fill_one(
    parameter: Tensor,
    found: Match,
    layer: int | None,
    layer_plan: LayerPlan | None,
    filler: _Filler,
    layout: ParallelLayout,
    rank: int,
) -> None:
    row = found.row
    if row.role == "router":
        assert layer_plan is not None
        parameter.copy_(torch.from_numpy(layer_plan.router_ED))
        return
    neurons_M = None
    if found.expert is not None:
        assert layer_plan is not None
        mine = local_experts(layout, rank=rank, num_experts=len(layer_plan.neurons_EM))
        neurons_M = layer_plan.neurons_EM[mine[found.expert]]
        part = Part(layout.experts.coords(rank)["etp"], layout.experts.size("etp"))
    else:
        part = Part(layout.attention.coords(rank)["tp"], layout.attention.size("tp"))
    if row.role in ("embedding", "output"):
        parameter.zero_()  # rows that pad the vocabulary
    source = row if row.role != "output" or not filler.dense.spec.tied_embeddings else _EMBEDDING
    filler.fill(
        parameter,
        pieces(source, layer=layer, part=part, spec=filler.dense.spec, neurons_M=neurons_M),
    )


_EMBEDDING = ROW_OF_ROLE["embedding"]
"""Where the last pipeline stage's output layer comes from when embeddings are tied."""
