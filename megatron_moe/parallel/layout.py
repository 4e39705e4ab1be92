"""Map ranks to the attention grid and to the expert grid, which are folded onto the same ranks.

Each rank has coordinates in two grids (MoE Parallel Folding, https://arxiv.org/abs/2504.14960)::

    attention layers    pp x dp  x cp x tp
    expert layers       pp x edp x ep x etp

Axes are listed slowest first, so a tp (or etp) group consists of consecutive ranks, which keeps it
inside a node. pp is outermost in both grids, so a pipeline stage has the same ranks in both. This
is Megatron-Core's default order, "tp-cp-ep-dp-pp", read from right to left.

This module needs neither torch nor process groups, so a layout can be computed on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_moe.config.run import Parallel
from megatron_moe.errors import ConfigError, nearest_multiples
from megatron_moe.parallel.stages import PipelineSplit


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Ranks ``0 .. world_size - 1`` on named axes, the slowest axis first."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def size(self, axis: str) -> int:
        """Return the length of one axis."""
        return self.shape[self.axes.index(axis)]

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinate of ``rank`` on each axis.

        >>> RankGrid(("dp", "tp"), (2, 4)).coords(5)
        {'dp': 1, 'tp': 1}
        """
        return {
            axis: int(i)
            for axis, i in zip(self.axes, np.unravel_index(rank, self.shape), strict=True)
        }

    def groups(self, *axes: str) -> list[list[int]]:
        """Return the groups of ranks that differ only on ``axes``.

        >>> RankGrid(("dp", "tp"), (2, 2)).groups("tp")
        [[0, 1], [2, 3]]
        """
        fixed = [i for i, axis in enumerate(self.axes) if axis not in axes]
        varied = [i for i, axis in enumerate(self.axes) if axis in axes]
        ranks = np.arange(math.prod(self.shape)).reshape(self.shape)
        group_size = math.prod(self.shape[i] for i in varied)
        return ranks.transpose(fixed + varied).reshape(-1, group_size).tolist()


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The two grids over the ranks of a job."""

    attention: RankGrid
    """Grid pp, dp, cp, tp: for attention, norms, embeddings, router and data."""

    experts: RankGrid
    """Grid pp, edp, ep, etp: for expert weights and their gradients."""

    @property
    def replicas(self) -> Replicas:
        """Sets of ranks that hold the whole model and exchange no activations with others."""
        attention, experts = self.attention, self.experts
        return Replicas(
            stage_ranks=math.prod(attention.shape[1:]),
            size=math.lcm(
                attention.size("cp") * attention.size("tp"),
                experts.size("ep") * experts.size("etp"),
            ),
        )


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas of the whole model: in each pipeline stage, ``size`` consecutive ranks.

    Data-parallel ranks that share experts (ep) belong to one replica.
    """

    stage_ranks: int
    """Ranks of a pipeline stage."""

    size: int
    """Ranks of a replica in one stage."""

    @property
    def count(self) -> int:
        """Number of replicas."""
        return self.stage_ranks // self.size

    def counterpart(self, rank: int, shift: int) -> int:
        """Return the rank with the same shards in the replica that is ``shift`` further.

        >>> Replicas(stage_ranks=4, size=2).counterpart(5, shift=1)
        7
        """
        place = rank % self.stage_ranks
        return rank - place + (place + shift * self.size) % self.stage_ranks


def fold(config: Parallel, *, world_size: int) -> ParallelLayout:
    """Arrange ``world_size`` ranks in grids for attention layers and for expert layers.

    Args:
        config: Degrees of parallelism; dp and edp are derived here.
        world_size: Number of ranks of the whole job.

    Returns:
        Both grids, over the same ranks.

    Raises:
        ConfigError: The degrees do not divide the world size.

    >>> layout = fold(Parallel(tensor_parallel_size=2, expert_parallel_size=4), world_size=8)
    >>> layout.attention.shape, layout.experts.shape
    ((1, 4, 1, 2), (1, 2, 4, 1))
    """
    pp, cp, tp = (
        config.pipeline_parallel_size,
        config.context_parallel_size,
        config.tensor_parallel_size,
    )
    ep, etp = config.expert_parallel_size, config.expert_tensor_parallel_size
    dp = _derive("dp", world_size, pp=pp, cp=cp, tp=tp)
    edp = _derive("edp", world_size, pp=pp, ep=ep, etp=etp)
    return ParallelLayout(
        attention=RankGrid(("pp", "dp", "cp", "tp"), (pp, dp, cp, tp)),
        experts=RankGrid(("pp", "edp", "ep", "etp"), (pp, edp, ep, etp)),
    )


def split_of(config: Parallel) -> PipelineSplit:
    """Return how the configuration divides layers into pipeline stages."""
    return PipelineSplit(
        first=config.num_layers_in_first_pipeline_stage,
        last=config.num_layers_in_last_pipeline_stage,
        layout=config.pipeline_model_parallel_layout,
    )


def local_experts(layout: ParallelLayout, *, rank: int, num_experts: int) -> range:
    """Return the global ids of the experts on ``rank``; each ep rank has a contiguous range."""
    num_local_experts = num_experts // layout.experts.size("ep")
    first = layout.experts.coords(rank)["ep"] * num_local_experts
    return range(first, first + num_local_experts)


def _derive(axis: str, world_size: int, **degrees: int) -> int:
    if message := indivisible_world(axis, world_size, degrees):
        raise ConfigError(message)
    return world_size // math.prod(degrees.values())


def indivisible_world(axis: str, world_size: int, degrees: Mapping[str, int]) -> str | None:
    """Return the message for a world size that ``degrees`` do not divide, else None.

    ``axis`` is the derived degree: the quotient.
    """
    product = math.prod(degrees.values())
    if world_size % product == 0:
        return None
    names, values = " * ".join(degrees), " * ".join(map(str, degrees.values()))
    return (
        f"world_size ({world_size}) must be divisible by {names} = {values} = {product}: "
        f"{axis} is the quotient.\n"
        f"  nearest world_size: {nearest_multiples(world_size, product)}"
    )
