"""Operations of Muon's Newton-Schulz iteration, on the rank that has most of them.

The state is sharded by whole matrices over the replicas, and all tp ranks of a matrix compute all
of it (``train/optimizers.py``). Nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.parts import ALL_TRAINED, Frozen, Role
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees

STEPS = 5
"""Newton-Schulz steps of an update (Megatron-Core's ``muon_num_ns_steps``)."""


def matrix_flops(rows: int, columns: int) -> int:
    """Return the operations of orthogonalizing one matrix.

    With ``m`` the smaller side, a step has a product of the matrix with its transpose, a square of
    that, and a product of the result with the matrix.
    """
    small, large = sorted((rows, columns))
    return STEPS * (4 * small**2 * large + 2 * small**3)


def orthogonalization_flops(
    shape: MoeShape, degrees: Degrees, frozen: Frozen = ALL_TRAINED
) -> float:
    """Return the operations of one update on a rank of the first pipeline stage.

    Matrices are assumed to be spread evenly over the replicas.
    """
    share = degrees.stage_shares(shape.num_layers)[0]
    dense = experts = 0
    for role, count, rows, columns in _matrices(shape, degrees):
        flops = shape.trained_layers(role, frozen) * count * matrix_flops(rows, columns)
        if role == "experts":
            experts += flops
        else:
            dense += flops
    return share * (dense / (degrees.dp * degrees.cp) + experts / degrees.edp)


def _matrices(shape: MoeShape, degrees: Degrees) -> Iterator[tuple[Role, int, int, int]]:
    """Yield role, number in a layer that has them, rows and columns of a rank's whole matrices."""
    d = shape.hidden_size
    yield "attention", 2, shape.query_width, d
    yield "attention", 2, shape.kv_width, d
    yield "dense_ffn", 3, shape.ffn_hidden_size, d
    yield "shared_experts", 3, shape.shared_expert_size, d
    yield "experts", 3 * shape.num_moe_experts // degrees.ep, shape.moe_ffn_hidden_size, d
    yield "router", 1, shape.num_moe_experts, d
