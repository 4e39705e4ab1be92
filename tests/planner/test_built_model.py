"""Compare the predicted model state with Megatron-Core's real objects, to the byte.

One process can act as any rank of any world size, because the fake backend needs no peers.
"""

import functools
import itertools
from typing import Any

import pytest
import torch.multiprocessing as mp

from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.memory import model_state
from megatron_moe.planner.shape import upcycled_shape
from megatron_moe.planner.workload import degrees_of
from megatron_moe.runtime.engine import TORCH_ON_CPU

# Odd sizes make padding visible: tensors are not multiples of 64, and the vocabulary is prime.
DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 8, "hidden_size": 48,
    "intermediate_size": 104, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12,
    "vocab_size": 1009, "max_position_embeddings": 256,
}  # fmt: skip

AXES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
LAYOUTS = [  # tp cp pp vpp ep etp, world size
    ((1, 1, 1, None, 1, 1), 1),
    ((1, 1, 1, None, 1, 1), 4),
    ((2, 1, 1, None, 1, 1), 8),
    ((4, 1, 1, None, 8, 1), 8),
    ((1, 2, 1, None, 2, 1), 8),
    ((2, 2, 2, None, 2, 2), 16),
    ((2, 1, 2, 2, 4, 1), 16),
    ((1, 1, 4, 2, 4, 1), 16),
    ((1, 1, 8, None, 1, 2), 16),
    ((2, 2, 1, None, 4, 2), 24),
    ((4, 1, 2, None, 1, 4), 24),
    ((2, 1, 2, 4, 8, 1), 32),
]


OLMO2 = {k: v for k, v in DENSE.items() if k != "head_dim"} | {
    "architectures": ["Olmo2ForCausalLM"], "num_key_value_heads": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("dense", "every"), [(DENSE, 1), (OLMO2, 4)], ids=["qwen3", "olmo2"])
def test_state_is_exact_to_the_byte(make_config, dense: dict[str, Any], every: int):
    configs = [
        make_config(
            gbs=8 * world,
            seq_length=64,
            moe={"moe_layers": [0, 1, 3, 6]},
            train={"precision": precision},
            **{f"{a}_parallel_size": n for a, n in zip(AXES, layout, strict=True) if n},
        )
        for (layout, world), precision in zip(
            LAYOUTS[::every], itertools.cycle(["bf16", "fp32"]), strict=False
        )
    ]
    worlds = [world for _, world in LAYOUTS[::every]]
    # Use a child process, because the CPU device patches torch.cuda for the whole process.
    mp.start_processes(_compare, args=(dense, configs, worlds), nprocs=1, start_method="fork")


def _compare(_: int, dense: dict[str, Any], configs: list, worlds: list[int]) -> None:
    from megatron_moe.runtime import cpu

    cpu.install()
    for config, world in zip(configs, worlds, strict=True):
        for rank in sorted({0, world // 3, world - 1}):
            measured, predicted = _one_rank(dense, config, world, rank)
            assert measured == predicted, (config.parallel, rank)


def _one_rank(
    dense: dict[str, Any], config, world: int, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups, destroy_groups
    from megatron_moe.train.state import make_state

    # The fake backend does not accept NCCL's options.
    parallel_state.create_group = functools.partial(_new_group, dist)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    spec = spec_from_config(dense)
    layout, groups = create_groups(config.parallel, seed=0)
    model = build_model(config, spec, layout=layout, groups=groups, rank=rank, engine=TORCH_ON_CPU)
    for module in model.modules:
        for parameter in module.parameters():
            parameter.data.zero_()
    measured = _measure(make_state(config, model, groups))
    attention, experts = layout.attention.coords(rank), layout.experts.coords(rank)
    state = model_state(
        upcycled_shape(spec, config.moe),
        degrees_of(config, gpus=world),
        pp_rank=attention["pp"],
        weight_bytes=2 if config.train.precision == "bf16" else 4,
        replica=attention["dp"] * layout.attention.size("cp") + attention["cp"],
        expert_replica=experts["edp"],
    )
    destroy_groups()
    dist.destroy_process_group()
    return measured, (state.weights, state.gradients, state.optimizer)


def _new_group(dist, ranks=None, *_: object, **__: object):
    return dist.new_group(ranks)


def _measure(state) -> tuple[int, ...]:
    """Return the bytes of parameter buffers, gradient buffers, and master weights and moments."""
    buffers = [b for chunk in state.wrapped for b in chunk.buffers + chunk.expert_parallel_buffers]
    weights = sum(b.param_data.numel() * b.param_data.element_size() for b in buffers)
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    optimizers = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    elements = sum(
        parameter.numel()
        for optimizer in optimizers
        for group in optimizer.optimizer.param_groups
        for parameter in group["params"]
    )
    master = 4 if weights * 2 == gradients else 0
    return weights, gradients, elements * (master + 8)
