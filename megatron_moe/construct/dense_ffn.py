"""Compute with the full weights of one dense FFN, and with a MoE layer made of its neurons.

Shape letters: T tokens, D hidden_size, F dense neurons, M neurons of an expert, E experts, S shared
neurons, N = E * M + S neurons of the MoE layer, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_moe.config.moe import Moe
from megatron_moe.experts.plan import LayerPlan
from megatron_moe.hf.names import ffn_names
from megatron_moe.hf.reader import SourceCheckpoint


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """Full weights of a dense FFN."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    @classmethod
    def read(
        cls, dense: SourceCheckpoint, layer: int, device: torch.device | str = "cpu"
    ) -> DenseFfn:
        """Read the weights of one layer, in fp32."""
        return cls(*(dense.read(name).to(device).float() for name in ffn_names(layer)))

    def activations(self, x_TD: Tensor, neurons: Tensor | slice = slice(None)) -> Tensor:
        """Return silu(gate) * up of these neurons, the input of ``down``."""
        gate_TM, up_TM = x_TD @ self.gate_FD[neurons].T, x_TD @ self.up_FD[neurons].T
        return torch.nn.functional.silu(gate_TM) * up_TM

    def output(self, x_TD: Tensor, neurons: Tensor | slice = slice(None)) -> Tensor:
        """Return the contribution of these neurons to the residual stream."""
        return self.activations(x_TD, neurons) @ self.down_DF[:, neurons].T


def plan_neurons(plan: LayerPlan) -> Tensor:
    """Return the dense neuron of each of the layer's N neurons: experts in order, then shared."""
    return torch.from_numpy(np.concatenate([plan.neurons_EM.ravel(), plan.shared_S]))


def features(act_TF: Tensor, weights_TE: Tensor, plan: LayerPlan) -> Tensor:
    """Return the inputs of ``down`` of all N neurons, times the combine weight: ``(T, N)``.

    The output of a MoE layer is linear in them: ``features @ down``.
    """
    size, experts = plan.neurons_EM.shape[1], plan.neurons_EM.shape[0]
    routed_TN = weights_TE.repeat_interleave(size, dim=1)
    shared_TS = weights_TE.new_ones(len(weights_TE), len(plan.shared_S))
    factors_TN = torch.cat([routed_TN[:, : experts * size], shared_TS], dim=1)
    return act_TF[:, plan_neurons(plan).to(act_TF.device)] * factors_TN


def combine_weights(logits_TE: Tensor, moe: Moe) -> Tensor:
    """Return the weight of each expert for each token, zero if it is not chosen."""
    scores_TE = logits_TE
    if moe.moe_router_score_function == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    elif moe.router_order == "softmax_topk":
        scores_TE = logits_TE.softmax(dim=-1)
    values_TK, chosen_TK = scores_TE.topk(moe.moe_router_topk, dim=-1)
    if moe.moe_router_score_function == "sigmoid":
        values_TK = values_TK / values_TK.sum(dim=-1, keepdim=True)
    elif moe.router_order == "topk_softmax":
        values_TK = values_TK.softmax(dim=-1)
    return torch.zeros_like(logits_TE).scatter(-1, chosen_TK, values_TK)


def router_of(ffn: DenseFfn, plan: LayerPlan) -> Tensor:
    """Return the plan's router rows, ``(E, D)``; rows of gate_mean come from the weights."""
    if plan.router_ED is not None:
        return torch.from_numpy(plan.router_ED).to(ffn.gate_FD.device)
    rows = [ffn.gate_FD[torch.from_numpy(n.copy())].mean(dim=0) for n in plan.neurons_EM]
    return torch.stack(rows)
