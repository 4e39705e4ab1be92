"""Solve ridge regressions whose rows arrive in batches, with sums and solutions in float64.

Minimizes, over W ``(F, D)`` and with rows z ``(F,)`` and targets y ``(D,)``,

    sum |z W - y|^2 + penalty * mean(diag(sum z z^T)) * |W - W0|^2

so a penalty is relative to the size of the features, and an infinite one gives W0. An unknown that
no row ever touched keeps its value of W0.

Shape letters: T rows of a batch, F unknowns per column, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RidgeSums:
    """Sums over rows: all that a solution needs, independent of the number of rows."""

    gram_FF: Tensor
    cross_FD: Tensor

    @classmethod
    def zeros(cls, features: int, columns: int, device: torch.device | str = "cpu") -> RidgeSums:
        """Return sums of no rows; they take ``8 * F * (F + D)`` bytes."""
        shapes = (features, features), (features, columns)
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, z_TF: Tensor, y_TD: Tensor) -> None:
        """Add a batch of rows; products are in the batch's dtype, sums in float64."""
        self.gram_FF.add_(z_TF.T @ z_TF)
        self.cross_FD.add_(z_TF.T @ y_TD)

    def plus(self, other: RidgeSums) -> RidgeSums:
        """Add the rows of ``other`` in place, and return these sums."""
        self.gram_FF.add_(other.gram_FF)
        self.cross_FD.add_(other.cross_FD)
        return self

    def map_(self, change: Callable[[Tensor], Tensor]) -> RidgeSums:
        """Return sums with ``change`` applied to both, such as a sum over ranks."""
        return RidgeSums(change(self.gram_FF), change(self.cross_FD))


@dataclass(frozen=True, slots=True)
class RidgeSolution:
    """A solution, and how well it is determined."""

    weights_FD: Tensor
    condition: float | None
    """Lower bound of the condition number of the penalized Gram matrix, from its Cholesky factor;
    beyond 1e12, digits of the solution are lost. None: nothing was solved."""


def solve(sums: RidgeSums, *, penalty: float, toward_FD: Tensor | None = None) -> RidgeSolution:
    """Return the weights that minimize the penalized squares, in float64.

    Args:
        sums: Sums over all rows.
        penalty: Relative penalty, positive.
        toward_FD: W0; None pulls toward zero.
    """
    weight = penalty * float(sums.gram_FF.diagonal().mean().clamp(min=1e-300))
    system_FF = sums.gram_FF.clone()
    system_FF.diagonal().add_(weight)
    right_FD = sums.cross_FD
    if toward_FD is not None:
        right_FD = right_FD + weight * toward_FD.double()
    factor_FF = torch.linalg.cholesky(system_FF)
    diagonal_F = factor_FF.diagonal()
    condition = float((diagonal_F.max() / diagonal_F.min()) ** 2)
    return RidgeSolution(torch.cholesky_solve(right_FD, factor_FF), condition)
