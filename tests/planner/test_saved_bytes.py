"""Compare the planner's count of bytes kept for the backward pass with autograd on real ranks.

The planner counts the layers of the engine, here torch's. On a CPU a few of their operations are
not fused and keep more tensors, which `unfused_bytes` counts. The sum must match the bytes that
autograd's saved-tensor hooks see over all layers within 5% (the rest is indices and statistics of a
few bytes per token).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import changes
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import tree

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.planner.activations import kept_bytes, local_tokens
from megatron_moe.planner.shape import MoeShape, run_shape
from megatron_moe.planner.workload import Degrees, Workload, degrees_of, workload_of
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
CASES = [
    "1", "1 recompute-full", "1 recompute-moe", "tp2 ep2", "cp2 ep2", "tp2 ep2 etp1 recompute-moe",
    "dp2 etp2", "tp2 cp2 ep2 recompute-full",
]  # fmt: skip


ADAPTED = ["1 lora", "tp2 ep2 lora"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*CASES, *ADAPTED])
def test_planned_bytes_are_what_autograd_saves(tmp_path: Path, name: str, precision: str):
    dense = save_dense(
        tmp_path / "dense", num_hidden_layers=2, hidden_size=128, intermediate_size=384
    )
    world_size, settings = changes(name)
    settings["moe"] |= {
        "num_moe_experts": 8, "moe_layers": [1],  # layer 0 stays dense
        # Each expert gets the mean number of tokens, so the planner need not assume an imbalance.
        "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True,
    }  # fmt: skip
    settings["train"] |= {"micro_batch_size": 2, "precision": precision}
    if name in ADAPTED:
        settings["lora"] = {"rank": 128, "targets": ["attention", "experts"]}
    text = {"path": str(tmp_path / "text"), "seq_length": 64}
    config = build(RunConfig, tree(tmp_path / "run", dense, tmp_path, data=text, **settings))
    run_on_ranks(check, config, world_size=world_size)


def check(world: World, config: RunConfig) -> None:
    from megatron_moe.hf.spec import read_spec

    spec = read_spec(config.source.path)
    saved = measure(world, config, spec)
    shape, work = run_shape(config, spec), workload_of(config)
    degrees = degrees_of(config, gpus=world.size)
    planned = stream_bytes(shape, work, degrees)  # input of the final norm
    for routes in (False, True):
        planned += kept_bytes(shape, work, degrees, routes=routes)
        planned += unfused_bytes(shape, work, degrees, routes=routes)
    assert saved == pytest.approx(planned, rel=0.05)


def unfused_bytes(shape: MoeShape, work: Workload, degrees: Degrees, *, routes: bool) -> float:
    """Return the extra bytes that unfused operations on a CPU keep in one layer."""
    tokens, value = local_tokens(shape, work, degrees), work.bytes_per_value
    if work.recompute == "full":  # rotary angles, shared by both layers
        return tokens.gathered / work.micro_batch_size * shape.kv_channels * 4 / 2
    heads = tokens.gathered / degrees.tp
    extra = 0.0
    if not routes:  # silu(gate), and separate copies of gate and up
        extra += 2 * heads * shape.ffn_hidden_size * value
    return extra


def stream_bytes(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    tokens = local_tokens(shape, work, degrees)
    return tokens.sequence_parallel * shape.hidden_size * work.bytes_per_value


def measure(world: World, config: RunConfig, spec: Any) -> int:
    """Return the bytes that autograd saves in a forward pass of the layers, without parameters."""
    from megatron_moe.data.batches import Batch, slice_for_context_parallel
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.groups import create_groups

    layout, groups = create_groups(config.parallel, seed=0)
    model = build_model(
        config, spec, layout=layout, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    (module,) = model.modules
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.05)
    size = (config.train.micro_batch_size, config.data.seq_length)
    tokens_BS = torch.randint(0, spec.vocab_size, size)
    batch = Batch(
        tokens_BS=tokens_BS, labels_BS=tokens_BS, loss_mask_BS=torch.ones(size),
        position_ids_BS=torch.arange(size[1]).expand(size), samples_B=torch.arange(size[0]),
    )  # fmt: skip
    batch = slice_for_context_parallel(batch, cp_rank=groups.cp.rank(), cp_size=groups.cp.size())
    saved: list[int] = []
    module.decoder.forward = _measured(module.decoder.forward, module, saved)
    module(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
    return saved[0]


def _measured(
    forward: Callable[..., Any], module: torch.nn.Module, saved: list[int]
) -> Callable[..., Any]:
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def measured(*args: Any, **kwargs: Any) -> Any:
        storages = {}  # kept alive, so that no address is reused

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        saved.append(sum(storage.nbytes() for storage in storages.values()))
        return output

    return measured
