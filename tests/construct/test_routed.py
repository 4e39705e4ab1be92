"""Neurons that change experts in turns with a router.

Shape letters: T tokens, D hidden_size, F dense neurons, E experts, M neurons of an expert.
"""

import numpy as np
import pytest
import torch

from megatron_moe.construct.dense_ffn import DenseFfn
from megatron_moe.construct.routed import routed_neurons
from megatron_moe.experts.plan import LayerPlan

T, D, E, M = 400, 64, 4, 6


def plan_of(neurons_EM: np.ndarray, shared_S: np.ndarray) -> LayerPlan:
    return LayerPlan(
        neurons_EM=neurons_EM, shared_S=shared_S, source_E=np.zeros(E, dtype=np.int64),
        expert_E=None, merge=None, reinit_EM=None, reinit_S=None, weight_scales=(1.0, 1.0, 1.0),
        output_scale=1.0, router_ED=None,
    )  # fmt: skip


def kinds_of_tokens(*, shared: int, seed: int) -> tuple[DenseFfn, torch.Tensor, np.ndarray]:
    """An FFN whose neuron i is active on tokens of kind kind_F[i] alone, and such tokens.

    The first ``shared`` neurons are active on all tokens.
    """
    rng = torch.Generator().manual_seed(seed)
    kind_F = torch.arange(E).repeat(M)[torch.randperm(E * M, generator=rng)]
    rows_FD = 4 * torch.nn.functional.one_hot(kind_F, D).float()
    common_SD = torch.zeros(shared, D)
    common_SD[:, E] = 4
    gate_FD = torch.cat([common_SD, rows_FD])
    kind_T = torch.arange(T) % E
    x_TD = torch.nn.functional.one_hot(kind_T, D).float()
    x_TD[:, E] = 1
    x_TD += 0.05 * torch.randn(T, D, generator=rng)
    down_DF = torch.nn.functional.normalize(torch.randn(D, E * M + shared, generator=rng), dim=0)
    return DenseFfn(gate_FD, gate_FD, down_DF), x_TD, kind_F.numpy()


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_neurons_of_a_kind_of_token_find_each_other(shared: int, seed: int):
    """Some neurons begin with the next expert and come back; the shared expert keeps its own.

    From a random partition, two kinds may share two experts in the end, as in k-means.
    """
    ffn, x_TD, kind_F = kinds_of_tokens(shared=shared, seed=seed)
    start_EM = np.stack([np.flatnonzero(kind_F == kind) for kind in range(E)]) + shared
    start_EM[:, :2] = np.roll(start_EM[:, :2], 1, axis=0)
    expected_EM = np.stack([np.flatnonzero(kind_F == kind) for kind in range(E)]) + shared
    plan = plan_of(start_EM, np.arange(shared))
    neurons_EM = routed_neurons(ffn, plan, x_TD, topk=1, max_load=1.5)
    np.testing.assert_array_equal(neurons_EM, expected_EM)
