"""Tests of the router's statistics on logits with known counts.

Shape letters: T tokens, E experts, K moe_router_topk.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.config.data import Data
from megatron_moe.config.moe import Moe, Source
from megatron_moe.config.run import Parallel, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed

SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
)

# Top-2 experts: (0, 1) for four tokens, (2, 0) for two, (1, 0) for one; expert 3 for none.
LOGITS_TE = torch.tensor(
    [[3.0, 2.0, 1.0, 0.0]] * 4 + [[2.0, 0.0, 3.0, -1.0]] * 2 + [[1.0, 5.0, 0.0, 0.5]]
)
CHOSEN_E = [7.0, 5.0, 2.0, 0.0]


def make_router(**moe: Any):
    from megatron_moe.model.capacity import capacity_of
    from megatron_moe.model.router import CapacityRouter

    config, megatron = router_arguments(**moe)
    router = CapacityRouter(capacity=capacity_of(config.moe), **megatron)
    router.weight.data.zero_()
    router.set_layer_number(1)
    return router.train()


def router_arguments(**moe: Any) -> tuple[RunConfig, dict[str, Any]]:
    from megatron_moe.model.config import transformer_config
    from megatron_moe.parallel.groups import create_groups

    config = RunConfig(
        run=Run(dir=Path("run")),
        source=Source(path=Path("dense")),
        moe=Moe(num_moe_experts=4, **moe),
        data=Data(path=Path("text"), seq_length=8),
        train=Train(steps=0, precision="fp32"),
    )
    _, groups = create_groups(Parallel(), seed=0)
    transformer = transformer_config(config, SPEC, engine=TORCH_ON_CPU)
    return config, {"config": transformer, "pg_collection": groups}


def route(router: Any, logits_TE: Tensor = LOGITS_TE) -> tuple[Tensor, Tensor]:
    return router.routing(logits_TE[:, None].clone().requires_grad_())


def entropy(logits_TE: Tensor) -> float:
    """Sum the entropy over tokens, in nats, with Python floats."""
    total = 0.0
    for row in logits_TE.tolist():
        weights = [math.exp(x) for x in row]
        shares = [w / sum(weights) for w in weights]
        total -= sum(p * math.log(p) for p in shares)
    return total


def test_choices_and_entropy_are_counted():
    run_on_ranks(check_counts, world_size=1)


def check_counts(world: World) -> None:
    router = make_router()
    route(router)
    chosen_E, scores_E, logs_E, kept_E = router.take_counts()
    assert chosen_E.tolist() == CHOSEN_E
    assert kept_E.tolist() == CHOSEN_E, "none dropped"
    # float64 throughout: a few roundings of 1e-16 each.
    torch.testing.assert_close(scores_E, LOGITS_TE.double().softmax(-1).sum(0), rtol=1e-12, atol=0)
    assert float(-logs_E.sum()) == pytest.approx(entropy(LOGITS_TE), rel=1e-9)


def test_counting_takes_few_kernels():
    """Statistics run in each layer and micro-batch, so kernel launches add up."""
    run_on_ranks(check_kernels, world_size=1)


def check_kernels(world: World) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    router = make_router()
    probs_TE, map_TE = route(router)  # first pass; later passes add to it
    with Calls():
        router.statistics.add(router._log_shares(LOGITS_TE), map_TE, probs_TE.detach())
    free = ("aten.empty", "aten.unbind", "aten.select", "aten.detach")
    launched = [name for name in Calls.names if not name.startswith(free)]
    assert len(launched) <= 9, launched


def test_counts_add_up_until_they_are_taken():
    run_on_ranks(check_adding_up, world_size=1)


def check_adding_up(world: World) -> None:
    router = make_router()
    assert router.take_counts().tolist() == [[0.0] * 4] * 4
    for _ in range(3):
        route(router)
    chosen_E, _, _, kept_E = router.take_counts()
    assert chosen_E.tolist() == [3 * n for n in CHOSEN_E]
    assert kept_E.tolist() == [3 * n for n in CHOSEN_E]
    assert not router.take_counts()[0].any(), "taking starts anew"


def test_only_training_is_counted():
    run_on_ranks(check_only_training, world_size=1)


def check_only_training(world: World) -> None:
    router = make_router()
    with torch.no_grad():
        route(router)
    route(router.eval())
    assert not router.take_counts().any()
    route(router.train())
    assert router.take_counts()[0].tolist() == CHOSEN_E


@pytest.mark.parametrize("pad", [False, True], ids=["as-many-as-came", "padded"])
def test_a_capacity_drops_choices_but_not_from_the_counts_before_dropping(pad: bool):
    run_on_ranks(check_capacity, pad, world_size=1)


def check_capacity(world: World, pad: bool) -> None:
    # Capacity ceil(7 * 2 / 4 * 1) = 4: expert 0 drops 3 of 7, expert 1 drops 1 of 5.
    router = make_router(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=pad)
    probs_TE, map_TE = route(router)
    assert map_TE.sum(dim=0).tolist() == ([4, 4, 4, 4] if pad else [4, 4, 2, 0])
    chosen_E, _, _, kept_E = router.take_counts()
    assert chosen_E.tolist() == CHOSEN_E
    assert (probs_TE > 0).sum(dim=0).tolist() == [4, 4, 2, 0], "as Megatron-Core kept them"
    assert kept_E.tolist() == [4, 4, 2, 0]


@pytest.mark.parametrize("order", ["topk_softmax", "softmax_topk"])
def test_routing_is_megatrons(order: str):
    run_on_ranks(check_routing, order, world_size=1)


def check_routing(world: World, order: str) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    router = make_router(router_order=order)
    probs_TE, map_TE = route(router)
    megatrons = TopKRouter.routing(router, LOGITS_TE[:, None].clone().requires_grad_())
    assert torch.equal(probs_TE, megatrons[0])
    assert torch.equal(map_TE, megatrons[1])
    # Mixtral's weights are a softmax over the chosen experts; others do not sum to one.
    softmax_E = LOGITS_TE[0].softmax(dim=0)
    expected = softmax_E[:2] / (softmax_E[:2].sum() if order == "topk_softmax" else 1.0)
    torch.testing.assert_close(probs_TE[0], torch.tensor([*expected.tolist(), 0.0, 0.0]))
