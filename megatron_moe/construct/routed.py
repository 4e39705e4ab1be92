"""Move neurons between experts in turns with a router, until each is where its tokens are sent.

A partition that looks at neurons alone may group them by what no router can see. Here a router is
fitted to the gains of the current experts, and each neuron then goes to the expert whose tokens it
contributes most to, measured by the squared norm of its contributions; every expert keeps its size.
Both steps are repeated. Neurons that most tokens want gather in the experts that ``max_load`` lets
most tokens have.

Shape letters: T sampled tokens, D hidden_size, F dense neurons, R routed neurons = E * M, M neurons
of an expert, E experts, S shared neurons.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.construct.dense_ffn import DenseFfn
from megatron_moe.construct.fit_router import Gains, RouterRegression, balanced_rows
from megatron_moe.experts.balanced import assign_most
from megatron_moe.experts.plan import LayerPlan
from megatron_moe.experts.recipe import ROUTING_TURNS


def routed_neurons(
    ffn: DenseFfn, plan: LayerPlan, inputs_TD: Tensor, *, topk: int, max_load: float
) -> NDArray[np.int64]:
    """Return the neurons of each expert, ``(E, M)``.

    Args:
        ffn: Dense layer.
        plan: Plan of the layer with the partition to begin with.
        inputs_TD: Sampled inputs of the layer.
        topk: Experts per token.
        max_load: Bound on the load of an expert, in multiples of the mean.
    """
    act_TF = ffn.activations(inputs_TD)
    shared = torch.from_numpy(plan.shared_S)
    y_TD = act_TF @ ffn.down_DF.T - act_TF[:, shared] @ ffn.down_DF[:, shared].T
    routed_R = np.sort(plan.neurons_EM.ravel())
    energy_TR = (act_TF[:, routed_R] * ffn.down_DF[:, routed_R].norm(dim=0)).square()
    neurons_EM = plan.neurons_EM
    for _ in range(ROUTING_TURNS):
        gains = Gains(ffn.down_DF, torch.from_numpy(neurons_EM.copy()))
        regression = RouterRegression.zeros(inputs_TD.shape[1], len(neurons_EM), inputs_TD.device)
        regression.add(inputs_TD, gains.of(act_TF, y_TD))
        rows_ED = balanced_rows(*regression.solve(), [inputs_TD], topk=topk, max_load=max_load)
        chosen_TK = (inputs_TD @ rows_ED.T).topk(topk, dim=-1).indices
        chosen_TE = torch.zeros(len(inputs_TD), len(neurons_EM)).scatter(1, chosen_TK, 1.0)
        expert_R = assign_most((energy_TR.T @ chosen_TE).double().numpy())
        neurons_EM = np.stack([routed_R[expert_R == expert] for expert in range(len(neurons_EM))])
    return neurons_EM
