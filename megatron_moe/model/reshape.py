"""Change the values of filled experts in place: scales, reinitialized neurons, noise, router rows.

Values that depend on several ranks (the mean of an expert that etp ranks share, the mean row of an
expert that ep rank 3 holds) are summed as integers. Fixed-point sums do not depend on the order, so
the weights have the same bits under every layout. All of it is one sum over the world.

Shape letters of this module:

    E  num_moe_experts   D  hidden_size   m  neurons of an expert on this etp rank
    L  MoE layers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.experts.draws import BLOCK_NEURONS, Use, normal_rows
from megatron_moe.experts.plan import LayerPlan
from megatron_moe.experts.recipe import Recipe
from megatron_moe.experts.reuse import copy_index
from megatron_moe.experts.router import twin_rows
from megatron_moe.experts.solved import read_solved
from megatron_moe.parallel.shards import ShardIndex

FIXED_POINT = 2**28
"""Fixed-point steps per unit: 2**28 weights of size 8 fill 63 bits, and a step is 1e-7 of a weight
of 0.03."""
ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class LocalExpert:
    """This rank's shard of one expert of one layer; the shared expert's id is E."""

    expert: int
    fc1_2mD: Tensor
    fc2_Dm: Tensor
    part: ShardIndex
    size: int
    """Neurons of the whole expert."""
    counts: bool
    """Whether this rank's shard enters sums over the ranks, which hold replicas of it."""

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of gate, up and down with one row per neuron of this rank."""
        gate_mD, up_mD = self.fc1_2mD.chunk(2)
        return gate_mD, up_mD, self.fc2_Dm.T

    @property
    def neurons(self) -> slice:
        """Neurons of the expert that this rank holds."""
        return self.part.slice_of(self.size)


@dataclass(frozen=True, slots=True)
class LocalLayer:
    """The experts of one MoE layer on this rank."""

    layer: int
    plan: LayerPlan
    experts: list[LocalExpert]
    router_ED: Tensor
    shared: LocalExpert | None = None
    """The shared expert, if there is one."""

    def redrawn(self) -> list[tuple[LocalExpert, NDArray[np.bool_]]]:
        """Return the experts that have neurons to reinitialize, each with its mask."""
        masks = self.plan.reinit_EM
        pairs = [] if masks is None else [(e, masks[e.expert]) for e in self.experts]
        if self.shared is not None and self.plan.reinit_S is not None:
            pairs.append((self.shared, self.plan.reinit_S))
        return pairs


@torch.no_grad()
def reshape_values(
    layers: list[LocalLayer],
    recipe: Recipe,
    *,
    solved: Path | None = None,
) -> None:
    """Apply the plan's changes of values to the filled ``layers`` of this rank.

    Every rank of the world must call it, even one without MoE layers. ``solved`` is the folder of
    solved ``down`` matrices (`experts.solved`), if there are any.
    """
    if recipe.reinit_ratio:
        moments = _world_sums(layers, recipe, _moments, (3, 2))
        for local in layers:
            _redraw(local, recipe, moments[recipe.moe_layers.index(local.layer)])
    if recipe.router_init == "gate_mean" and "router" not in recipe.fit:
        rows = _world_sums(layers, recipe, _gate_rows, (recipe.hidden_size,))
        for local in layers:
            mean_ED = rows[recipe.moe_layers.index(local.layer)] / recipe.expert_ffn_hidden_size
            local.router_ED.copy_(mean_ED[: recipe.num_experts].float())
    for local in layers:
        if solved is not None:
            _put_solved(local, recipe, solved)
        for expert in local.experts:
            _scale(expert, local.plan.weight_scales)
            if recipe.noise_std and _gets_noise(local.plan, expert.expert):
                _add_noise(local, expert, recipe)
        if local.plan.expert_E is not None:
            difference_ED = twin_rows(recipe, local.layer, local.plan.expert_E)
            if difference_ED is not None:
                rows_ED = torch.from_numpy(difference_ED).to(local.router_ED.device)
                local.router_ED.copy_(local.router_ED.float() + rows_ED)


def _gets_noise(plan: LayerPlan, expert: int) -> bool:
    """Return whether noise is added: to all experts of a dense source, to copies of a MoE's."""
    return plan.expert_E is None or bool(copy_index(plan.expert_E)[expert])


def _world_sums(
    layers: list[LocalLayer],
    recipe: Recipe,
    measure: Callable[[LocalLayer, LocalExpert], Tensor],
    shape: tuple[int, ...],
) -> Tensor:
    """Sum ``measure`` over the shards of each expert, ``(L, E + 1, *shape)``, in float64."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    size = (len(recipe.moe_layers), recipe.num_experts + 1, *shape)
    sums = torch.zeros(size, dtype=torch.int64, device=device)
    for local in layers:
        shared = [local.shared] if local.shared is not None else []
        for expert in [*local.experts, *shared]:
            if expert.counts:
                index = recipe.moe_layers.index(local.layer)
                sums[index, expert.expert] = measure(local, expert)
    dist.all_reduce(sums)
    return sums.double() / FIXED_POINT


def _fixed(values: Tensor) -> Tensor:
    return (values.double() * FIXED_POINT).round().long()


def _reinitialized(local: LocalLayer, expert: LocalExpert) -> Tensor:
    """Return the indices of this rank's neurons that are reinitialized."""
    for redrawn, mask_M in local.redrawn():
        if redrawn is expert:
            return torch.from_numpy(mask_M[expert.neurons].nonzero()[0])
    return torch.zeros(0, dtype=torch.int64)


def _moments(local: LocalLayer, expert: LocalExpert) -> Tensor:
    """Return sum and sum of squares of the neurons to reinitialize, by matrix: ``(3, 2)``."""
    sums = torch.zeros(3, 2, dtype=torch.int64)
    for rows in _reinitialized(local, expert).split(ROWS_AT_ONCE):
        for i, matrix_mD in enumerate(expert.matrices):
            values = matrix_mD[rows].double()
            sums[i, 0] += _fixed(values).sum()
            sums[i, 1] += _fixed(values.square()).sum()
    return sums


def _gate_rows(local: LocalLayer, expert: LocalExpert) -> Tensor:
    """Return the sum of the expert's gate rows, ``(D,)``."""
    gate_mD = expert.matrices[0]
    sums = [_fixed(rows_mD).sum(dim=0) for rows_mD in gate_mD.split(ROWS_AT_ONCE)]
    return torch.stack(sums).sum(dim=0)


def _redraw(local: LocalLayer, recipe: Recipe, moments: Tensor) -> None:
    """Overwrite neurons with normal numbers of their joint mean and standard deviation."""
    for expert, mask_M in local.redrawn():
        count = int(mask_M.sum()) * recipe.hidden_size
        for i in range(3 if count else 0):
            total, squares = moments[expert.expert, i].tolist()
            mean = total / count
            std = max(squares / count - mean**2, 0.0) ** 0.5
            for neurons, into_mD, drawn_mD in _drawn(local, expert, recipe, Use.REINIT_VALUES, i):
                fresh_m = torch.from_numpy(mask_M[neurons])[:, None].to(into_mD.device)
                new_mD = (drawn_mD * std + mean).to(into_mD.dtype)
                into_mD.copy_(torch.where(fresh_m, new_mD, into_mD))


def _add_noise(local: LocalLayer, expert: LocalExpert, recipe: Recipe) -> None:
    for i in range(3):
        for _, into_mD, drawn_mD in _drawn(local, expert, recipe, Use.NOISE, i):
            into_mD.copy_(into_mD.float() + drawn_mD * recipe.noise_std)


def _drawn(
    local: LocalLayer, expert: LocalExpert, recipe: Recipe, use: Use, matrix: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield runs of this rank's neurons: their range in the expert, the target, normal numbers."""
    own = expert.neurons
    matrix_mD = expert.matrices[matrix]
    key = (use, expert.expert, matrix)
    for start in range(own.start // BLOCK_NEURONS * BLOCK_NEURONS, own.stop, BLOCK_NEURONS):
        run = slice(max(start, own.start), min(start + BLOCK_NEURONS, own.stop))
        drawn_mD = normal_rows(
            recipe.seed, local.layer, *key, neurons=run, width=recipe.hidden_size
        )
        into_mD = matrix_mD[run.start - own.start : run.stop - own.start]
        yield run, into_mD, torch.from_numpy(drawn_mD).to(into_mD.device)


def _put_solved(local: LocalLayer, recipe: Recipe, folder: Path) -> None:
    """Overwrite ``down`` of this rank's experts with their rows of the solution."""
    size = recipe.expert_ffn_hidden_size
    for expert in local.experts:
        own, first = expert.neurons, expert.expert * size
        rows = slice(first + own.start, first + own.stop)
        expert.fc2_Dm.copy_(torch.from_numpy(read_solved(folder, local.layer, rows)).T)
    if local.shared is not None:
        own, first = local.shared.neurons, recipe.num_experts * size
        rows = slice(first + own.start, first + own.stop)
        local.shared.fc2_Dm.copy_(torch.from_numpy(read_solved(folder, local.layer, rows)).T)


def _scale(expert: LocalExpert, scales: tuple[float, float, float]) -> None:
    for matrix_mD, scale in zip(expert.matrices, scales, strict=True):
        for rows_mD in matrix_mD.split(ROWS_AT_ONCE) if scale != 1.0 else ():
            rows_mD.copy_(rows_mD.float() * scale)
