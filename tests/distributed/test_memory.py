"""Reading only the shard: bytes and memory of each rank on a model too large to be held by all.

A 2-layer Llama whose FFN is 1 GiB in bf16 (three matrices a layer), copied to 4 experts: the MoE
has 4 GiB of experts, a rank under EP4 holds 1 GiB of them and under EP2 x ETP2 two halves.
"""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import save_file
from training_runs import tree, write_tokens
from transformers import LlamaConfig

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
MIB = 2**20
HIDDEN, FFN = 1024, 87384
FFN_BYTES = 2 * 3 * HIDDEN * FFN * 2  # layers, matrices, hidden, neurons, bytes of bf16
assert FFN_BYTES >= 1024 * MIB

# Beside the shard: one window of a file (32 MiB), the router rows and Python's own.
CONSTANT = 160 * MIB


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "dense"
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=257, max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = dict(dense_tensors(read_spec(folder)))
    save_file(
        {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"expert_parallel_size": 4}, id="ep4"),
        pytest.param({"expert_parallel_size": 2, "expert_tensor_parallel_size": 2}, id="ep2-etp2"),
    ],
)
def test_a_rank_reads_and_holds_its_shard_only(
    dense: Path, tmp_path: Path, parallel: dict[str, int]
):
    settings = tree(
        tmp_path / "run", dense, write_tokens(tmp_path / "tokens"),
        parallel=parallel, train={"steps": 0, "global_batch_size": 4, "precision": "bf16"},
    )  # fmt: skip
    run_on_ranks(upcycle_only, build(RunConfig, settings), world_size=4)
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    etp = parallel.get("expert_tensor_parallel_size", 1)
    for rank in receipt["ranks"]:
        attention = rank["parameter_bytes"] - FFN_BYTES
        assert 0 < attention < 64 * MIB
        # Under EP2 x ETP2 two local experts are copies of one half: it is read once.
        router = 2 * 4 * HIDDEN * 2
        assert rank["bytes_read"] == FFN_BYTES // etp + attention - router
        grown = rank["peak_bytes"] - rank["held_bytes_before"]
        assert grown <= rank["parameter_bytes"] + CONSTANT, rank
    assert receipt["tensors_covered"] == len(dict(dense_tensors(read_spec(dense))))


def upcycle_only(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.job import Job
    from megatron_moe.commands.upcycling import upcycled_model
    from megatron_moe.data.texts import open_texts
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.hf.reader import open_safetensors
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.guard import Signals
    from megatron_moe.train.watch import Watch, unobserved

    config.run.dir.mkdir(parents=True, exist_ok=True)
    layout, groups = create_groups(config.parallel, seed=0)
    watch = Watch(world, hang_seconds=60, observe=unobserved)
    job = Job(config, world, TORCH_ON_CPU, layout, groups, watch, Signals())
    opened = open_safetensors(config.source.path)
    plan = make_expert_plan(opened.spec, config.moe, config.upcycle)
    texts = open_texts(config, vocab_size=opened.spec.vocab_size)
    upcycled_model(job, opened, plan, texts)
