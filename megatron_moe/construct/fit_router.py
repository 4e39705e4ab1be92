"""Fit a router: regress what each expert would contribute, and price experts that are too popular.

The gain of expert e for a token is how much of the dense layer's output y it explains alone,
2 p.y - |p|^2 with p its contribution. Gains are standardized per token and regressed on the
layer's input. A price per expert then lowers its logits by a constant, as far as a linear function
of the input can express one, until no expert is chosen more than ``max_load`` times the mean.

Shape letters: T tokens, D hidden_size, E experts, K top-k, F dense neurons, M neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.construct.ridge import RidgeSums, solve

PENALTY = 1e-3
"""Relative penalty of the regression: inputs of a layer have directions without any variance."""
LOGIT_STD = 0.3
"""Standard deviation of the targets. Small: the combine weights of chosen experts stay close to
each other, as the parts of a layer add up with equal weights."""
MARGINS = (0.94, 0.97)
"""Parts of the bound on the load that are aimed at and accepted: other text is routed a little
differently, and prices approach their target from above."""
PRICE_ROUNDS = 500
LEAST_STEP = 1e-3


class Gains:
    """Gain of each expert for each token, computed batch by batch.

    Args:
        down_DF: Output weights of the dense layer.
        neurons_EM: Neurons of each expert.
    """

    def __init__(self, down_DF: Tensor, neurons_EM: Tensor) -> None:
        self._down_DF, self._neurons_EM = down_DF, neurons_EM
        parts = [down_DF[:, neurons_M] for neurons_M in neurons_EM]
        self._grams = [down_DM.T @ down_DM for down_DM in parts]

    def of(self, act_TF: Tensor, y_TD: Tensor) -> Tensor:
        """Return the standardized gains, ``(T, E)``.

        Args:
            act_TF: Activations of the dense layer's neurons.
            y_TD: Output that the routed experts must explain.
        """
        along_TF, columns = y_TD @ self._down_DF, []
        for neurons_M, gram_MM in zip(self._neurons_EM, self._grams, strict=True):
            act_TM = act_TF[:, neurons_M]
            overlap_T = (act_TM * along_TF[:, neurons_M]).sum(dim=1)
            square_T = ((act_TM @ gram_MM) * act_TM).sum(dim=1)
            columns.append(2 * overlap_T - square_T)
        gain_TE = torch.stack(columns, dim=1)
        gain_TE = gain_TE - gain_TE.mean(dim=1, keepdim=True)
        return gain_TE / gain_TE.std(dim=1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True, slots=True)
class RouterRegression:
    """Sums of the regression of gains, and of a constant, on the inputs of a layer."""

    sums: RidgeSums
    """E columns of gains, and a last column of ones."""

    @classmethod
    def zeros(cls, hidden: int, experts: int, device: torch.device | str) -> RouterRegression:
        """Return the sums of no tokens."""
        return cls(RidgeSums.zeros(hidden, experts + 1, device))

    def add(self, x_TD: Tensor, gain_TE: Tensor) -> None:
        """Add a batch of tokens."""
        self.sums.add(x_TD, torch.cat([gain_TE, torch.ones_like(gain_TE[:, :1])], dim=1))

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return rows before any price ``(E, D)``, and the row of a constant ``(D,)``."""
        rows = solve(self.sums, penalty=PENALTY).weights_FD.T.float()
        return rows[:-1], rows[-1]


class Prices:
    """Prices of experts, adjusted until no load exceeds the bound.

    Args:
        experts: E.
        max_load: Bound on the load of an expert, in multiples of the mean.
    """

    def __init__(self, experts: int, max_load: float) -> None:
        self.price_E = torch.zeros(experts, dtype=torch.float64)
        self._bound, self._accepted = (max(1.0, max_load * margin) for margin in MARGINS)
        self._round, self._step = 0, 1.0
        self._best, self._best_E = float("inf"), self.price_E

    def adjust(self, load_E: Tensor) -> bool:
        """Change the prices for these loads; return whether they are final.

        Prices follow the subgradient of the dual problem: an expert above the bound gets more
        expensive, one below it cheaper again, down to a price of zero. Steps grow while they help,
        because in some layers a constant is hard to express. After `PRICE_ROUNDS`, the best prices
        count.
        """
        busiest = float(load_E.max())
        better = busiest < self._best
        self._step = self._step * 1.1 if better else max(self._step * 0.9, LEAST_STEP)
        if better:
            self._best, self._best_E = busiest, self.price_E
        if busiest <= self._accepted or self._round == PRICE_ROUNDS:
            self.price_E = self._best_E
            return True
        self._round += 1
        change_E = self._step * (load_E.cpu() - self._bound)
        self.price_E = (self.price_E + change_E).clamp(min=0)
        return False


def balanced_rows(
    rows_ED: Tensor, one_D: Tensor, inputs: Iterable[Tensor], *, topk: int, max_load: float,
    total: Callable[[Tensor], Tensor] = lambda load_E: load_E,
) -> Tensor:  # fmt: skip
    """Return the router's rows ``(E, D)`` with prices that keep the loads under ``max_load``.

    Args:
        rows_ED: Rows before any price, on the device of the inputs.
        one_D: Row of a constant.
        inputs: Inputs of the layer ``(T, D)``, in batches.
        topk: K.
        max_load: Bound on the load of an expert, in multiples of the mean.
        total: Function that adds the loads of all ranks.
    """
    priced = [(x_TD @ rows_ED.T, x_TD @ one_D) for x_TD in inputs]
    prices = Prices(len(rows_ED), max_load)
    while True:
        price_E = prices.price_E.float().to(rows_ED.device)
        load_E = torch.zeros(len(rows_ED), dtype=torch.float64, device=rows_ED.device)
        for logits_TE, one_T in priced:
            load_E += loads(logits_TE - one_T[:, None] * price_E, topk)
        load_E = total(load_E)
        if prices.adjust(load_E / load_E.mean()):
            price_E = prices.price_E.float().to(rows_ED.device)
            return LOGIT_STD * (rows_ED - price_E[:, None] * one_D)


def loads(logits_TE: Tensor, topk: int) -> Tensor:
    """Return how many tokens choose each expert, ``(E,)`` in float64."""
    chosen_TK = logits_TE.topk(topk, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[1]).double()
