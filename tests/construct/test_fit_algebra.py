"""Check the algebra of fitting against least squares in float64.

Shape letters: T tokens, F unknowns per column, D columns, E experts, M neurons of an expert.
"""

import numpy as np
import torch

from megatron_moe.config.moe import Moe
from megatron_moe.construct.dense_ffn import DenseFfn, combine_weights, features
from megatron_moe.construct.fit_router import Gains, Prices, loads
from megatron_moe.construct.ridge import RidgeSums, solve
from megatron_moe.experts.plan import LayerPlan

RNG = torch.Generator().manual_seed(0)
T, D, F, E = 200, 6, 24, 4


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


FFN = DenseFfn(normal(F, D), normal(F, D), normal(D, F))
X_TD = normal(T, D)
PLAN = LayerPlan(
    neurons_EM=np.arange(F).reshape(E, -1), shared_S=np.zeros(0, dtype=np.int64),
    source_E=np.zeros(E, dtype=np.int64), expert_E=None, merge=None,
    reinit_EM=None, reinit_S=None,
    weight_scales=(1.0, 1.0, 1.0),
    output_scale=1.0, router_ED=normal(E, D).float().numpy(),
)  # fmt: skip


def summed(z_TF: torch.Tensor, y_TD: torch.Tensor) -> RidgeSums:
    sums = RidgeSums.zeros(z_TF.shape[1], y_TD.shape[1])
    for rows in torch.arange(len(z_TF)).split(37):
        sums.add(z_TF[rows], y_TD[rows])
    return sums


def test_the_solution_minimizes_the_penalized_squares():
    """The oracle stacks the penalty as extra rows and calls numpy's least squares."""
    z_TF, y_TD, toward_FD, penalty = normal(T, F), normal(T, D), normal(F, D), 0.3
    solution = solve(summed(z_TF, y_TD), penalty=penalty, toward_FD=toward_FD)
    root = (penalty * (z_TF.T @ z_TF).diagonal().mean()).sqrt()
    rows = torch.cat([z_TF, root * torch.eye(F, dtype=torch.float64)])
    expected, *_ = np.linalg.lstsq(rows, torch.cat([y_TD, root * toward_FD]), rcond=None)
    np.testing.assert_allclose(solution.weights_FD, expected, rtol=1e-9, atol=1e-11)


def test_an_infinite_penalty_gives_the_sliced_weights():
    toward_FD = normal(F, D)
    solution = solve(summed(normal(T, F), normal(T, D)), penalty=1e14, toward_FD=toward_FD)
    torch.testing.assert_close(solution.weights_FD, toward_FD, rtol=1e-10, atol=1e-10)


def test_an_unknown_that_no_row_touched_keeps_its_value():
    z_TF, toward_FD = normal(T, F), normal(F, D)
    z_TF[:, 5:9] = 0
    solution = solve(summed(z_TF, normal(T, D)), penalty=1e-6, toward_FD=toward_FD)
    torch.testing.assert_close(solution.weights_FD[5:9], toward_FD[5:9])


def test_for_fixed_routing_the_residual_is_orthogonal_to_the_features():
    weights_TE = combine_weights(
        X_TD @ torch.from_numpy(PLAN.router_ED).double().T,  # pyright: ignore
        Moe(num_moe_experts=E, moe_router_topk=2),
    )
    z_TF = features(FFN.activations(X_TD), weights_TE, PLAN)
    y_TD = FFN.output(X_TD)
    down_FD = solve(summed(z_TF, y_TD), penalty=1e-13).weights_FD
    residual_TD = y_TD - z_TF @ down_FD
    scale = z_TF.norm() * y_TD.norm()
    assert float((z_TF.T @ residual_TD).abs().max() / scale) < 1e-9
    sliced_FD = FFN.down_DF.T * E / 2
    assert residual_TD.norm() < (y_TD - z_TF @ sliced_FD).norm()


def test_with_every_expert_and_equal_weights_the_solution_is_the_dense_layer():
    weights_TE = torch.full((T, E), 1 / E, dtype=torch.float64)
    z_TF = features(FFN.activations(X_TD), weights_TE, PLAN)
    down_FD = solve(summed(z_TF, FFN.output(X_TD)), penalty=1e-14).weights_FD
    torch.testing.assert_close(down_FD, E * FFN.down_DF.T, rtol=1e-6, atol=1e-6)


def test_a_gain_is_what_an_expert_takes_off_the_error():
    act_TF, y_TD = FFN.activations(X_TD), FFN.output(X_TD)
    parts_ETD = [FFN.output(X_TD, torch.from_numpy(n)) for n in PLAN.neurons_EM]
    explained = [y_TD.square().sum(1) - (y_TD - part).square().sum(1) for part in parts_ETD]
    expected_TE = torch.stack(explained, dim=1)
    expected_TE = expected_TE - expected_TE.mean(dim=1, keepdim=True)
    expected_TE = expected_TE / expected_TE.std(dim=1, keepdim=True)
    actual_TE = Gains(FFN.down_DF, torch.from_numpy(PLAN.neurons_EM)).of(act_TF, y_TD)
    torch.testing.assert_close(actual_TE, expected_TE)


def test_prices_bring_every_load_under_the_bound():
    logits_TE = normal(T * 20, E) + torch.tensor([3.0, 1.0, 0.0, -2.0])
    prices, rounds = Prices(E, max_load=1.2), 0
    while True:
        load_E = loads(logits_TE - prices.price_E, topk=2)
        if prices.adjust(load_E / load_E.mean()):
            break
        rounds += 1
    assert float((load_E / load_E.mean()).max()) <= 1.2
    assert rounds < 100
    assert loads(logits_TE, topk=2).max() / (T * 20 * 2 / E) > 1.9, "prices were needed"
