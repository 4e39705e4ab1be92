"""Noisy top-k gate (arXiv 1701.06538) with the balance loss of LLaMA-MoE.

logits = x W + normal * (softplus(x W_noise) + 0.01), with noise only in training; W_noise starts at
zero. The balance loss is CV^2(importance) + CV^2(load), where importance is the sum of the tokens'
weights and load is the expected number of tokens, a smooth function of the logits (LLaMA-MoE,
arXiv 2406.16554, 3.3).

Shape letters of this module:

    T  tokens this rank routes   E  num_moe_experts   K  moe_router_topk
    s  positions of this rank    B  micro_batch_size  D  hidden_size
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from torch import Tensor

from megatron_moe.model.noise import normal_numbers
from megatron_moe.model.router import CapacityRouter

LEAST_STD = 1e-2


class NoisyRouter(CapacityRouter):
    """CapacityRouter with noisy choices during training.

    Args:
        network: ``linear``, or ``mlp`` for Linear(D, E), tanh, Linear(E, E).
        balance: Coefficient of the CV^2 loss; 0 leaves balancing to Megatron-Core's losses.
        seed: Seed of the noise.
        **others: Arguments of `CapacityRouter`.
    """

    def __init__(self, *, network: str, balance: float, seed: int, **others: Any) -> None:
        super().__init__(**others)
        self._balance, self._seed = balance, seed
        self.noise_weight = self._parameter(self.weight.shape[1])
        self.output_weight = self._parameter(len(self.weight)) if network == "mlp" else None
        self.samples_B = torch.zeros(1, dtype=torch.int64)
        self._waiting: deque[Tensor] = deque()
        self._clean_TE, self._std_TE = torch.empty(0), torch.empty(0)

    def set_balance(self, coefficient: float) -> None:
        """Set the coefficient of the loss that balances this layer: ours, or Megatron-Core's."""
        super().set_balance(coefficient)
        self._balance = coefficient if self._balance else 0.0

    def start_pass(self, samples_B: Tensor) -> None:
        """Set the samples of the next forward pass, which key its noise."""
        super().start_pass(samples_B)
        self.samples_B = samples_B

    def _parameter(self, width: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(self.weight.new_empty(len(self.weight), width))
        # As for the router's weight: its gradient is summed over tp if sequence-parallel.
        setattr(parameter, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010
        return parameter

    def gating(self, input: Tensor) -> Tensor:
        """Return the logits of each token, ``(s, B, D)`` to ``(s, B, E)``; noisy in training."""
        clean_sBE = super().gating(input)
        if self.output_weight is not None:
            clean_sBE = F.linear(clean_sBE.tanh(), self.output_weight.to(clean_sBE.dtype))
        if not self.training:
            return clean_sBE
        raw_sBE = router_gating_linear(input, self.noise_weight, None, clean_sBE.dtype)
        std_sBE = F.softplus(raw_sBE) + LEAST_STD
        self._clean_TE, self._std_TE = clean_sBE.flatten(0, 1), std_sBE.flatten(0, 1)
        noise_sBE = normal_numbers(
            seed=self._seed,
            layer=self.layer,
            samples_B=self._samples_of_this_pass().to(clean_sBE.device),
            positions_s=self.positions(len(clean_sBE)).to(clean_sBE.device),
            num_experts=clean_sBE.shape[-1],
        )
        return clean_sBE + noise_sBE.to(clean_sBE.dtype) * std_sBE

    def _samples_of_this_pass(self) -> Tensor:
        """Return the samples of this pass; for a recomputed layer, those of its first pass.

        A first pass that will be recomputed builds no graph, and every pipeline schedule recomputes
        passes in their original order.
        """
        if not torch.is_grad_enabled():
            self._waiting.append(self.samples_B)
            return self.samples_B
        return self._waiting.popleft() if self._waiting else self.samples_B

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices as the base class; attach the balance loss to weights."""
        probs_TE, map_TE = super().routing(logits, padding_mask=padding_mask)
        if self._balance and self.training and torch.is_grad_enabled():
            noisy_TE = logits.flatten(0, 1)
            sums_2E = torch.stack([probs_TE.float().sum(dim=0), self._expected_load(noisy_TE)])
            group = self.tp_cp_group
            sums_2E = reduce_from_tensor_model_parallel_region(sums_2E, group)
            loss = squared_variation(sums_2E).sum()
            # Every rank has the whole loss, and logged values are summed over ranks.
            get_moe_metrics_tracker().record(
                "load_balancing_loss", loss / group.size(), self.layer + 1,
                self.config.num_layers, reduce_group=group,
            )  # fmt: skip
            # Megatron-Core divides all gradients by the tokens of the global batch.
            tokens = len(probs_TE) * group.size()
            scaled = loss * self._balance * tokens
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, scaled)
        return probs_TE, map_TE

    def _expected_load(self, noisy_TE: Tensor) -> Tensor:
        """Sum over tokens the probability that an expert is in the top K when its noise is redrawn.

        An expert is in the top K if its logit exceeds the K-th best of the others. Among all noisy
        logits that is the K-th best if the expert is not in the top K, and the next if it is.
        """
        clean_TE, std_TE = self._clean_TE.float(), self._std_TE.float()
        if self.topk == clean_TE.shape[1]:
            return torch.full_like(clean_TE[0], len(clean_TE))
        best_TK = noisy_TE.float().topk(self.topk + 1, dim=-1).values
        inside_TE = noisy_TE.float() > best_TK[:, self.topk, None]
        threshold_TE = torch.where(
            inside_TE, best_TK[:, self.topk, None], best_TK[:, self.topk - 1, None]
        )
        return torch.special.ndtr((clean_TE - threshold_TE) / std_TE).sum(dim=0)


def squared_variation(values_XE: Tensor) -> Tensor:
    """Return each row's squared coefficient of variation: variance over squared mean."""
    return values_XE.var(dim=-1) / (values_XE.mean(dim=-1) ** 2 + 1e-10)
