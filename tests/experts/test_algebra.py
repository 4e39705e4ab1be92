"""Compare the experts of a plan with the dense layer they are made of, in float64.

Shape letters: T tokens, D hidden_size, F dense neurons, M neurons of an expert, E experts, K top-k.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.experts.methods import METHODS
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan, LayerPlan, LayerTable, make_expert_plan
from megatron_moe.hf.spec import spec_from_config

D, F, T = 16, 48, 20
SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": D,
        "intermediate_size": F, "num_attention_heads": 4, "vocab_size": 64,
    }
)  # fmt: skip
LAYER = 1
RNG = torch.Generator().manual_seed(0)
GATE_FD, UP_FD = (torch.randn(F, D, generator=RNG, dtype=torch.float64) for _ in range(2))
DOWN_DF = torch.randn(D, F, generator=RNG, dtype=torch.float64)
X_TD = torch.randn(T, D, generator=RNG, dtype=torch.float64)


def swiglu(neurons, scales=(1.0, 1.0, 1.0)) -> Tensor:
    index = torch.as_tensor(np.array(neurons))
    gate, up = scales[0] * GATE_FD[index], scales[1] * UP_FD[index]
    return (torch.nn.functional.silu(X_TD @ gate.T) * (X_TD @ up.T)) @ (
        scales[2] * DOWN_DF[:, index]
    ).T


DENSE_TD = swiglu(range(F))


def moe_output(layer: LayerPlan, *, topk: int, order: str) -> Tensor:
    """Compute the MoE layer like Megatron-Core, expert by expert."""
    logits_TE = X_TD @ torch.from_numpy(layer.router_ED).double().T
    weights_TE = weights_of(logits_TE, topk=topk, order=order)
    out_TD = swiglu(layer.shared_S)
    for expert, neurons_M in enumerate(layer.neurons_EM):
        part = swiglu(neurons_M, layer.weight_scales) * layer.output_scale
        out_TD = out_TD + weights_TE[:, expert, None] * part
    return out_TD


def weights_of(logits_TE: Tensor, *, topk: int, order: str) -> Tensor:
    chosen = logits_TE.topk(topk, dim=-1).indices
    if order == "softmax_topk":
        values = logits_TE.softmax(-1).gather(-1, chosen)
    else:
        values = logits_TE.gather(-1, chosen).softmax(-1)
    return torch.zeros_like(logits_TE).scatter(-1, chosen, values)


def make(experts: int, size: int | None = None, *, topk: int = 2, shared=None, order=None, **up):
    moe = Moe(
        num_moe_experts=experts, moe_ffn_hidden_size=size, moe_router_topk=topk,
        moe_shared_expert_intermediate_size=shared, router_order=order or "topk_softmax",
    )  # fmt: skip
    return make_expert_plan(SPEC, moe, Upcycle(**up))


GRANULAR = [
    pytest.param(g, r, k, id=f"G{g}-R{r}-K{k}")
    for g, r in itertools.product((2, 4, 8), (1, 2, 3))
    for k in range(g, g * r + 1, g)
]


@pytest.mark.parametrize(("granularity", "replicas", "topk"), GRANULAR)
@pytest.mark.parametrize("at", ["weights", "runtime"])
def test_granular_exact_is_the_dense_layer(granularity, replicas, topk, at):
    plan = make(
        granularity * replicas, F // granularity, topk=topk, method="granular", rescale_at=at,
        router_init_std=0.5, permutation_seed=3,
    )  # fmt: skip
    output = moe_output(plan.layer(LAYER), topk=topk, order="topk_softmax")
    torch.testing.assert_close(output, DENSE_TD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("granularity", [2, 4])
def test_granular_with_probabilities_of_all_is_dense_for_a_uniform_router(granularity):
    """The factor R G G / K restores the magnitude if each of the N probabilities is 1 / N."""
    experts = 2 * granularity
    plan = make(
        experts, F // granularity, topk=granularity, method="granular", order="softmax_topk",
        router_init_std=1e-12,
    )  # fmt: skip
    output = moe_output(plan.layer(LAYER), topk=granularity, order="softmax_topk")
    torch.testing.assert_close(output, DENSE_TD, rtol=1e-9, atol=1e-9)


def test_the_papers_cube_root_is_not_exact():
    """The cube root also scales the argument of SiLU, which is why exact is the default."""
    plan = make(4, F // 2, method="granular", scale="paper")
    output = moe_output(plan.layer(LAYER), topk=2, order="topk_softmax")
    assert (output - DENSE_TD).abs().max() > 0.1
    assert np.prod(plan.recipe.weight_scales) == pytest.approx(2)


def test_copies_are_the_dense_layer():
    layer = make(4, router_init_std=0.5).layer(LAYER)
    output = moe_output(layer, topk=2, order="topk_softmax")
    torch.testing.assert_close(output, DENSE_TD, rtol=1e-12, atol=1e-12)


def with_table(plan: ExpertPlan) -> ExpertPlan:
    recipe, measured = plan.recipe, np.random.default_rng(1).random((plan.recipe.num_experts, F))
    if plan.needs == "nothing":
        return plan
    evidence = Evidence(up_FD=UP_FD.float().numpy(), importance_CF=measured, activity_CF=measured)
    part = METHODS[recipe.method].partition(recipe, LAYER, evidence)
    return plan.with_tables({LAYER: LayerTable(neurons_EM=part.neurons_EM, shared_S=part.shared_S)})


PARTITIONS = [
    ("split_random", None), ("split_random", 16), ("split_clustered", None),
    ("split_clustered", 16), ("weaver", 16),
]  # fmt: skip


@pytest.mark.parametrize(("method", "shared"), PARTITIONS)
def test_all_experts_of_a_partition_sum_to_the_dense_layer(method, shared):
    size = (F - (shared or 0)) // 4
    plan = with_table(make(4, size, shared=shared, topk=4, method=method, rescale="none"))
    layer = plan.layer(LAYER)
    together = sorted([*layer.neurons_EM.ravel(), *layer.shared_S])
    assert together == list(range(F)), "each neuron once"
    total = swiglu(layer.shared_S) + sum(swiglu(neurons_M) for neurons_M in layer.neurons_EM)
    torch.testing.assert_close(total, DENSE_TD, rtol=1e-12, atol=1e-12)


def test_all_experts_chosen_by_an_even_router_and_rescaled_by_n_are_the_dense_layer():
    plan = make(4, 8, shared=16, topk=4, method="split_random", rescale="N", router_init_std=0.0)
    output = moe_output(plan.layer(LAYER), topk=4, order="topk_softmax")
    torch.testing.assert_close(output, DENSE_TD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rescale", "factor"), [("N/K", 2.0), ("N", 4.0), ("none", 1.0)])
def test_rescale_factors(rescale, factor):
    plan = make(4, 12, method="split_random", rescale=rescale)
    assert plan.layer(LAYER).weight_scales == (1.0, 1.0, factor)
    at_runtime = make(4, 12, method="split_random", rescale=rescale, rescale_at="runtime")
    assert at_runtime.layer(LAYER).weight_scales == (1.0, 1.0, 1.0)
    assert at_runtime.layer(LAYER).output_scale == factor


def test_a_calibrated_factor_is_the_layers_own():
    plan = make(4, 12, method="split_random", rescale="calibrated", plan=Path("p"))
    plan = plan.with_tables({0: LayerTable(output_scale=3.0), 1: LayerTable(output_scale=5.0)})
    assert [plan.layer(layer).weight_scales[2] for layer in (0, 1)] == [3.0, 5.0]
