"""Count the bytes of weights, gradients and optimizer state of a rank with Muon, exactly.

Muon's state is sharded by whole matrices over the replicas, as in
``megatron/core/optimizer/layer_wise_optimizer.py`` (0.19.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_moe.config.parts import ALL_TRAINED, Frozen
from megatron_moe.planner.memory import (
    ADAM_ROLES,
    ModelState,
    has_own_replicas,
)
from megatron_moe.planner.parameters import LocalTensor, rank_tensors
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, StatePrecision


def muon_state(
    shape: MoeShape,
    degrees: Degrees,
    *,
    pp_rank: int,
    weight_bytes: int = 2,
    sharded: bool = True,
    replica: int = 0,
    expert_replica: int = 0,
    frozen: Frozen = ALL_TRAINED,
    precision: StatePrecision | None = None,
) -> ModelState:
    """Return the exact bytes of one rank; see `memory.model_state` for the arguments.

    Gradients are not in padded buffers, because Megatron-Core's distributed optimizer is off.
    """
    precision = precision or StatePrecision()
    chunks = rank_tensors(shape, degrees, pp_rank=pp_rank)
    held = [tensor for chunk in chunks for tensor in chunk]
    trained = [tensor for tensor in held if not frozen.covers(tensor.part)]
    kept: Iterable[LocalTensor] = trained
    if sharded:
        kept = kept_tensors(trained, degrees, replica=replica, expert_replica=expert_replica)
    master = precision.master if weight_bytes < 4 else 0
    return ModelState(
        weights=sum(tensor.numel for tensor in held) * weight_bytes,
        gradients=sum(tensor.numel for tensor in trained) * precision.gradient,
        optimizer=sum(
            tensor.numel
            * (master + (precision.momentum if is_matrix(tensor) else precision.moments))
            for tensor in kept
        ),
    )


def is_matrix(tensor: LocalTensor) -> bool:
    """Return whether Muon updates the parameter; AdamW updates the others."""
    return tensor.part.role not in ADAM_ROLES and not tensor.name.endswith(".bias")


def kept_tensors(
    tensors: list[LocalTensor], degrees: Degrees, *, replica: int, expert_replica: int
) -> Iterator[LocalTensor]:
    """Yield the parameters whose optimizer state a replica keeps.

    They go to the replicas in turns, there and back, from the smallest to the largest. With one
    replica of attention nothing is sharded, not even experts (train/muon.py).
    """
    replicas = degrees.dp * degrees.cp
    if replicas == 1:
        yield from tensors
        return
    turns = {False: (replicas, replica), True: (degrees.edp, expert_replica)}
    taken = {False: 0, True: 0}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.numel, not is_matrix(tensor))):
        kind = tensor.expert and has_own_replicas(degrees)
        count, own = turns[kind]
        turn = taken[kind] % (2 * count)
        taken[kind] += 1
        if min(turn, 2 * count - 1 - turn) == own:
            yield tensor
