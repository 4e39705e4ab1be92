"""Count where a router sends its tokens.

Shape letters of this module:

    T  tokens this rank routes   E  num_moe_experts
"""

from __future__ import annotations

import torch
from torch import Tensor


class RouterStatistics:
    """Sums over the tokens of all passes since they were last taken."""

    def __init__(self) -> None:
        """Start with no tokens."""
        self._sums_4E: Tensor | None = None

    @torch.no_grad()
    def add(self, log_shares_TE: Tensor, chosen_TE: Tensor, weights_TE: Tensor) -> None:
        """Add one pass in float64, with few kernels: this runs in every layer.

        All four numbers of a token and expert are written into one tensor and summed at once.

        Args:
            log_shares_TE: See `log_shares`.
            chosen_TE: Choices before any were dropped.
            weights_TE: Combine weights; zero for dropped choices.
        """
        numbers_4TE = torch.empty(4, *chosen_TE.shape, dtype=torch.float64, device=chosen_TE.device)
        chosen, share, share_log_share, kept = numbers_4TE
        chosen.copy_(chosen_TE)
        torch.exp(log_shares_TE, out=share)
        torch.mul(log_shares_TE, share, out=share_log_share)
        torch.gt(weights_TE, 0, out=kept)
        sums_4E = numbers_4TE.sum(dim=1)
        self._sums_4E = sums_4E if self._sums_4E is None else self._sums_4E.add_(sums_4E)

    def take(self) -> Tensor | None:
        """Return and reset the sums, ``(4, E)`` in float64; None if there was no pass.

        Returns:
            Per expert: tokens that chose it, before any were dropped; its share of the score
            (shares sum to 1 per token); share times log(share), whose sum over experts is minus the
            entropy (nats); and tokens that chose it and were kept.
        """
        sums_4E, self._sums_4E = self._sums_4E, None
        return sums_4E


def log_shares(logits_TE: Tensor, score_function: str) -> Tensor:
    """Return the log of every expert's share of a token's score, in float64."""
    if score_function == "softmax":
        return logits_TE.log_softmax(dim=-1, dtype=torch.float64)
    log_TE = torch.nn.functional.logsigmoid(logits_TE.double())
    return log_TE - log_TE.logsumexp(dim=-1, keepdim=True)
