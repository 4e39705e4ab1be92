"""Online upcycling: fill this rank's parameters from the source checkpoint, in place.

For every local parameter, the name table gives its source tensors, the plan gives the neurons that
an expert takes of a dense FFN or of a source expert, and ``parallel/shards.py`` gives this rank's
slices. These slices are read directly into the parameter. There is no source model, no full tensor,
no second copy and no broadcast. Each parameter is filled exactly once by one rule, and the ranks
together use each tensor of the checkpoint; otherwise the run stops and lists what is missing.

If a plan also changes values (scales, reinitialized neurons, noise, router rows that are means of
weights), `model/reshape.py` does so afterwards, in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import ExpertPlan, LayerPlan
from megatron_moe.hf.names import (
    MOE_TENSORS,
    ROW_OF_ROLE,
    Match,
    Row,
    Scope,
    Sharding,
    dense_tensors,
    match,
)
from megatron_moe.hf.reader import ReadRequest, SourceCheckpoint
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.hf.windows import WINDOW_BYTES
from megatron_moe.model.build import Chunk, Model
from megatron_moe.model.lora import fill_adapter
from megatron_moe.model.reshape import LocalExpert, LocalLayer, reshape_values
from megatron_moe.model.routers import GATE_VALUES
from megatron_moe.parallel.layout import ParallelLayout, local_experts
from megatron_moe.parallel.shards import Piece, ShardIndex, pieces


@dataclass(frozen=True, slots=True)
class Filled:
    """Summary of the upcycling on this rank."""

    parameters: int
    """Local parameters, each filled exactly once."""
    parameter_bytes: int
    bytes_read: int
    """Bytes read from the checkpoint; slices that several experts share are read once."""
    sources: frozenset[tuple[int, str]]
    """Tensors that this rank read, each with the index of its checkpoint."""


@dataclass(slots=True)
class _Filler:
    """Read pieces into parameters: each distinct piece of a layer once, in one pass per tensor."""

    checkpoints: Sequence[SourceCheckpoint]
    sources: set[tuple[int, str]] = field(default_factory=set)
    seen: dict[tuple, Tensor] = field(default_factory=dict)
    wanted: dict[tuple[int, str], list[ReadRequest]] = field(default_factory=dict)
    """Pieces for `read` to read, by checkpoint and tensor."""
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Targets, and the tensors to copy them from after reading."""

    def fill(self, parameter: Tensor, parts: list[Piece], *, source: int | None) -> None:
        """Schedule reads from checkpoint ``source``; if None, read the average of all now."""
        for piece in parts:
            target, key = parameter[piece.into], (source, *piece.key)
            if (holder := self.seen.get(key)) is not None:
                self.copies.append((target, holder))
                continue
            self.seen[key] = target
            if source is None and len(self.checkpoints) > 1:
                self._average(piece, target)
            else:
                wanted = self.wanted.setdefault((source or 0, piece.source), [])
                wanted.append(ReadRequest(target, piece.rows, piece.columns))

    def fill_mean(self, parameter: Tensor, members: Iterable[tuple[float, list[Piece]]]) -> None:
        """Read the weighted mean of several tensors of checkpoint 0 in fp32.

        Args:
            parameter: Local parameter to fill.
            members: Weight and pieces of each tensor.
        """
        total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        read = torch.empty_like(total)
        for weight, parts in members:
            for piece in parts:
                self._read(0, piece, read[piece.into])
            total.add_(read, alpha=weight)
        parameter.copy_(total)

    def fill_mixed(self, parameter: Tensor, name: str, weights_EO: NDArray[np.float64]) -> None:
        """Read all rows of a tensor of checkpoint 0, and fill with weighted sums of them."""
        shape = (weights_EO.shape[1], *parameter.shape[1:])
        rows = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        self._read(0, Piece(name, None, None, slice(None)), rows)
        mixing = torch.from_numpy(weights_EO).to(parameter.device)
        parameter.copy_(mixing @ rows.double())

    def read(self) -> None:
        """Read all scheduled pieces."""
        for (source, name), wanted in self.wanted.items():
            self.checkpoints[source].read_all_into(name, wanted)
            self.sources.add((source, name))
        for target, holder in self.copies:
            target.copy_(holder)
        self.seen.clear()
        self.wanted.clear()
        self.copies.clear()

    def _read(self, source: int, piece: Piece, target: Tensor) -> None:
        self.checkpoints[source].read_into(
            piece.source, target, rows=piece.rows, columns=piece.columns
        )
        self.sources.add((source, piece.source))

    def _average(self, piece: Piece, target: Tensor) -> None:
        """Read the mean over checkpoints in fp32, window by window; rows must be consecutive."""
        assert not isinstance(piece.rows, np.ndarray), piece
        first = piece.rows.start if piece.rows is not None else 0
        step = max(1, WINDOW_BYTES // (4 * target[0].numel()))
        for start in range(0, len(target), step):
            window = target[start : start + step]
            rows = slice(first + start, first + start + len(window))
            total = torch.zeros(window.shape, dtype=torch.float32, device=window.device)
            read = torch.empty_like(total)
            for source in range(len(self.checkpoints)):
                self._read(source, replace(piece, rows=rows), read)
                total += read
            window.copy_(total / len(self.checkpoints))


def upcycle(
    model: Model,
    dense: SourceCheckpoint,
    plan: ExpertPlan,
    *,
    layout: ParallelLayout,
    rank: int,
    mix_with: Sequence[SourceCheckpoint] = (),
) -> Filled:
    """Fill every parameter of ``model`` on this rank, and apply the plan's changes of values.

    Args:
        model: Newly built model with uninitialized parameters.
        dense: Dense checkpoint whose tensors were checked against its config.
        plan: Assignment of neurons to experts.
        layout: Parallel layout of the run.
        rank: This rank.
        mix_with: Other checkpoints of a plan with several sources.

    Raises:
        CheckpointError: No rule fills a parameter, a tensor holds NaN or infinity, or the plan was
            read without its solved matrices.
    """
    if plan.solved_layers and plan.solved is None:
        raise CheckpointError(
            f"the plan has solved down matrices of {len(plan.solved_layers)} layers, but they are "
            "not beside its file.\n  set upcycle.plan to the file that construct wrote"
        )
    filled, layers = fill(model, [dense, *mix_with], plan, layout=layout, rank=rank)
    reshape_values(layers, plan.recipe, solved=plan.solved)
    return filled


@torch.no_grad()
def fill(
    model: Model,
    checkpoints: Sequence[SourceCheckpoint],
    plan: ExpertPlan,
    *,
    layout: ParallelLayout,
    rank: int,
    layers_only: bool = False,
    into: Mapping[Tensor, Tensor] | None = None,
) -> tuple[Filled, list[LocalLayer]]:
    """Read all parameters: the first half of `upcycle`, without communication between ranks.

    With ``layers_only``, parameters outside the layers keep their values. With ``into``, the
    values of each parameter go into that tensor of the same shape instead.

    Returns:
        A summary, and this rank's MoE layers for `reshape_values`.
    """
    assert len(checkpoints) == plan.recipe.num_sources, (len(checkpoints), plan.recipe)
    filler = _Filler(checkpoints)
    before, count, size = _bytes_read(checkpoints), 0, 0
    experts = checkpoints[0].spec.experts
    biases = experts is not None and experts.moe_router_enable_expert_bias
    local_layers: list[LocalLayer] = []
    for chunk in model.chunks:
        for layer, parameters in _by_layer(chunk, biases=biases):
            if layers_only and layer is None:
                continue
            local = _LayerSource(checkpoints[0], layer, plan, layout, rank)
            for parameter, matched in parameters:
                target = parameter if into is None else into[parameter]
                local.fill(target, matched, filler)
                count += 1
                size += parameter.numel() * parameter.element_size()
            filler.read()
            if local.layer_plan is not None:
                local_layers.append(local.local_layer(parameters))
    read = _bytes_read(checkpoints) - before
    return Filled(count, size, read, frozenset(filler.sources)), local_layers


def check_coverage(filled: Filled, dense: SourceCheckpoint, plan: ExpertPlan) -> int:
    """Return the number of tensors that the ranks used together.

    These must be all tensors of the source, but for those of experts that the plan leaves out.

    Raises:
        CheckpointError: On every rank, if no rank used some tensor of the source model.
    """
    gathered: list[frozenset[tuple[int, str]]] = [frozenset()] * dist.get_world_size()
    dist.all_gather_object(gathered, filled.sources)
    expected = {
        (i, name) for i in range(plan.recipe.num_sources) for name, _ in dense_tensors(dense.spec)
    }
    expected -= {(0, name) for name in _left_out(dense.spec, plan)}
    used = frozenset().union(*gathered)
    if unused := sorted(expected - used):
        listed = "\n".join(f"    {name}" for _, name in unused)
        raise CheckpointError(f"{len(unused)} tensors of the checkpoint were not used:\n{listed}")
    return len(used)


def _left_out(spec: ModelSpec, plan: ExpertPlan) -> Iterator[str]:
    """Yield the names of the tensors of source experts that the plan leaves out."""
    names = [name for role in ("expert_fc1", "expert_fc2") for name in MOE_TENSORS[role]]
    if spec.experts is None:
        return
    for layer in spec.experts.moe_layers:
        layer_plan = plan.layer(layer)
        expert_E = layer_plan.expert_E
        assert expert_E is not None
        if layer_plan.merge is not None:
            continue  # all experts are merged
        for expert in sorted(set(range(spec.experts.num_moe_experts)) - set(expert_E.tolist())):
            yield from (name.format(layer=layer, expert=expert) for name in names)


def _bytes_read(checkpoints: Sequence[SourceCheckpoint]) -> int:
    return sum(checkpoint.bytes_read for checkpoint in checkpoints)


def _by_layer(
    chunk: Chunk, *, biases: bool
) -> Iterator[tuple[int | None, list[tuple[Tensor, Match]]]]:
    """Yield the chunk's parameters with their rules by layer; None is outside the layers.

    With ``biases``, also the experts' biases, which are buffers; otherwise they stay zero.
    """
    groups: dict[int | None, list[tuple[Tensor, Match]]] = {}
    unknown = []
    tensors = list(chunk.module.named_parameters())
    if biases:
        tensors += [pair for pair in chunk.module.named_buffers() if match(pair[0])]
    for name, parameter in tensors:
        matched = match(name)
        if matched is None:
            unknown.append(name)
            continue
        layer = None if matched.layer is None else chunk.layers[matched.layer]
        groups.setdefault(layer, []).append((parameter, matched))
    if unknown:
        listed = "\n".join(f"    {name}" for name in unknown)
        raise CheckpointError(
            f"{len(unknown)} local parameters have no source in the checkpoint:\n{listed}"
        )
    yield from groups.items()


class _LayerSource:
    """Sources of the parameters of one layer on one rank (None: outside the layers)."""

    def __init__(
        self,
        dense: SourceCheckpoint,
        layer: int | None,
        plan: ExpertPlan,
        layout: ParallelLayout,
        rank: int,
    ) -> None:
        self.dense, self.layer, self.recipe = dense, layer, plan.recipe
        self.coords = {**layout.attention.coords(rank), **layout.experts.coords(rank)}
        self.layer_plan: LayerPlan | None = None
        if layer is not None and layer in plan.recipe.moe_layers:
            self.layer_plan = plan.layer(layer)
        self.experts = local_experts(layout, rank=rank, num_experts=plan.recipe.num_experts)
        self.tp = ShardIndex(self.coords["tp"], layout.attention.size("tp"))
        self.etp = ShardIndex(self.coords["etp"], layout.experts.size("etp"))

    def fill(self, parameter: Tensor, matched: Match, filler: _Filler) -> None:
        """Fill one parameter from the dense model, or schedule its reads."""
        row, part, neurons, source = matched.row, self.tp, None, None
        source_expert: int | None = None
        if row.scope is Scope.MOE:
            self._fill_router(parameter, matched, filler)
            return
        if row.scope is Scope.GATE:
            GATE_VALUES[row.role](parameter)
            return
        if row.scope is Scope.ADAPTER:
            assert self.layer is not None
            expert = None if matched.expert is None else self.experts[matched.expert]
            fill_adapter(
                parameter, row, layer=self.layer, part=self.tp, seed=self.recipe.seed, expert=expert
            )
            return
        if matched.expert is not None:
            assert self.layer_plan is not None
            expert, part = self.experts[matched.expert], self.etp
            neurons = self.layer_plan.neurons_EM[expert]
            source = int(self.layer_plan.source_E[expert])
            if self.layer_plan.expert_E is not None:
                source_expert = int(self.layer_plan.expert_E[expert])
        elif row.scope is Scope.SHARED:
            assert self.layer_plan is not None
            neurons = self.layer_plan.shared_S
        if row.role == "output" and self.dense.spec.tied_embeddings:
            row = ROW_OF_ROLE["embedding"]  # the last stage's copy
        if matched.expert is not None and (members := self._members(row, matched.expert)):
            filler.fill_mean(parameter, members)
            return
        parts = pieces(
            row, layer=self.layer, part=part, spec=self.dense.spec, neurons_M=neurons,
            expert=source_expert,
        )  # fmt: skip
        if row.sharding is Sharding.VOCABULARY:
            parameter[parts[-1].into.stop if parts else 0 :].zero_()  # padding of the vocabulary
        filler.fill(parameter, parts, source=source)

    def _members(self, row: Row, expert: int) -> list[tuple[float, list[Piece]]]:
        """Return the weight and the pieces of the source experts that an expert merges, if any."""
        merge = None if self.layer_plan is None else self.layer_plan.merge
        if merge is None:
            return []
        return [
            (
                float(merge.weight_O[member]),
                pieces(
                    row, layer=self.layer, part=self.etp, spec=self.dense.spec,
                    neurons_M=merge.order_OM[member], expert=member,
                ),
            )
            for member in merge.members(self.experts[expert])
        ]  # fmt: skip

    def _fill_router(self, parameter: Tensor, matched: Match, filler: _Filler) -> None:
        """Fill router rows and expert biases by the plan, or from the experts of a MoE source."""
        assert self.layer_plan is not None
        plan, row = self.layer_plan, matched.row
        name = (
            MOE_TENSORS[row.role][0].format(layer=self.layer) if plan.expert_E is not None else ""
        )
        if plan.merge is not None:
            filler.fill_mixed(parameter, name, plan.merge.mixing())
        elif plan.expert_E is not None:
            filler.fill(parameter, [Piece(name, plan.expert_E, None, slice(None))], source=0)
        elif plan.router_ED is not None:
            parameter.copy_(torch.from_numpy(plan.router_ED))

    def local_layer(self, parameters: list[tuple[Tensor, Match]]) -> LocalLayer:
        """Return the filled experts of the layer for `reshape_values`."""
        assert self.layer is not None
        assert self.layer_plan is not None
        by_role = {(m.row.role, m.expert): tensor for tensor, m in parameters}
        experts = [
            LocalExpert(
                expert, by_role["expert_fc1", i], by_role["expert_fc2", i], self.etp,
                size=self.recipe.expert_ffn_hidden_size, counts=self.coords["edp"] == 0,
            )
            for i, expert in enumerate(self.experts)
        ]  # fmt: skip
        shared = None
        if ("shared_fc1", None) in by_role:
            shared = LocalExpert(
                self.recipe.num_experts, by_role["shared_fc1", None], by_role["shared_fc2", None],
                self.tp, size=self.recipe.shared_size,
                counts=self.coords["dp"] == 0 and self.coords["cp"] == 0,
            )  # fmt: skip
        return LocalLayer(self.layer, self.layer_plan, experts, by_role["router", None], shared)
