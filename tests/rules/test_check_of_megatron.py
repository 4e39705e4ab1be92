"""Compare the rules on random layouts with Megatron-Core, which creates groups and builds models.

One process can act as any rank (torch's fake backend needs no peers), so Megatron-Core itself
decides whether a layout is valid, in `initialize_model_parallel` and the construction of GPTModel.
It must accept every layout that the rules accept. The rules are stricter only in two respects:

* batch and sequence: Megatron-Core detects errors in the middle of the first step, or never;
* vpp with one stage: its schedule needs two stages, which it asserts at the first step.
"""

import functools
import math
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.rules.check import violations
from megatron_moe.runtime.engine import TORCH_ON_CPU

pytestmark = pytest.mark.distributed

DENSE = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6, "hidden_size": 48,
    "intermediate_size": 36, "num_attention_heads": 12, "num_key_value_heads": 6,
    "vocab_size": 60, "max_position_embeddings": 64,
}  # fmt: skip
STRICTER = (
    "data.seq_length (", "train.global_batch_size (", "micro-batches of a step",
    "parallel.virtual_pipeline_parallel_size (",
)  # fmt: skip
AXES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
SIZES = st.sampled_from([1, 1, 1, 1, 2, 2, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """Draw degrees and a world size that is often legal for them."""
    degrees = {f"{axis}_parallel_size": draw(SIZES) for axis in AXES}
    tp, cp, pp, _, ep, etp = degrees.values()
    fitting = math.lcm(pp * tp * cp, pp * ep * etp)
    world = draw(st.sampled_from([fitting, fitting, 2 * fitting, 8]))
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "run", "device": "cpu"},
        "source": {"path": "dense"},
        "moe": {"num_moe_experts": 8},
        "parallel": degrees,
        "data": {"path": "text", "seq_length": draw(st.sampled_from([48, 48, 50, 63]))},
        "train": {"steps": 10, "global_batch_size": draw(st.sampled_from([144, 144, 50, 7]))},
        "optimizer": {"warmup_steps": 2},
    }
    return build(RunConfig, tree), world


@pytest.mark.parametrize("groups", [6, 2])
def test_the_rules_reject_whatever_megatron_rejects(groups: int):
    # Use a child process, because Megatron-Core's groups are global to a process.
    mp.start_processes(_compare, args=(groups,), nprocs=1, start_method="fork")


def _compare(_: int, groups: int) -> None:
    dense = DENSE | {"num_key_value_heads": groups}
    seen = {"both": 0, "neither": 0, "stricter": 0}

    @settings(max_examples=120, phases=[Phase.generate], derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(layouts())
    def agree(drawn: tuple[RunConfig, int]) -> None:
        config, world = drawn
        messages = violations(config, spec_from_config(dense), world)
        error = _error_of_megatron(config, world, dense)
        if error is not None:
            assert messages, (
                f"the rules accept what Megatron-Core rejects: {config.parallel} {world}: {error}"
            )
            seen["neither"] += 1
        elif messages:
            stricter = all(message.startswith(STRICTER) for message in messages)
            assert stricter, (config.parallel, messages)
            seen["stricter"] += 1
        else:
            seen["both"] += 1

    agree()
    assert min(seen.values()) >= 5, f"some outcomes were too rare: {seen}"


def _error_of_megatron(config: RunConfig, world: int, dense: dict[str, Any]) -> str | None:
    """Return Megatron-Core's error for the layout on the first or last rank, or None."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups, destroy_groups

    # The fake backend does not accept NCCL's options.
    parallel_state.create_group = functools.partial(_new_group, dist)
    for rank in {0, world - 1}:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            layout, groups = create_groups(config.parallel, seed=0)
            with torch.device("meta"):
                model = build_model(
                    config, spec_from_config(dense), layout=layout, groups=groups, rank=rank,
                    engine=TORCH_ON_CPU,
                )  # fmt: skip
            for stage in range(len(model.chunks)):  # our spec computes layers itself
                get_num_layers_to_build(model.transformer, stage, groups.pp.rank())
        except (AssertionError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            destroy_groups()
            dist.destroy_process_group()
    return None


def _new_group(dist: Any, ranks: Any = None, *_: object, **__: object) -> Any:
    return dist.new_group(ranks)
