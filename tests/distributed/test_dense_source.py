"""A checkpoint that Megatron-Core wrote gives the same model as the folder it came from."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS
from megatron.core import dist_checkpointing
from ranks import run_on_ranks
from tiny import save_dense, save_moe
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.experts.from_source import complete_from_source, source_config
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World
from megatron_moe.source.open import DistributedSource, open_source

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "layers",
    ["layers-in-one-tensor", pytest.param("one-tensor-a-layer", marks=pytest.mark.slow)],
)
def test_it_upcycles_to_the_same_bits(tmp_path: Path, layers: str):
    family = {"one-tensor-a-layer": "llama", "layers-in-one-tensor": "qwen2"}[layers]
    hf = save_dense(tmp_path / "hf", family)
    saved = tmp_path / "distributed"
    saved.mkdir()
    shutil.copy(hf / "config.json", saved)
    tokens = write_tokens(tmp_path / "tokens")
    world_size, parallel = LAYOUTS["tp2"]
    config = build(RunConfig, tree(tmp_path, hf, tokens, parallel=parallel))
    run_on_ranks(save, config, saved, layers == "one-tensor-a-layer", world_size=world_size)
    apart = "decoder.layers.0.mlp.linear_fc1.weight" in GlobalTensors(saved)
    assert apart == (layers == "one-tensor-a-layer")
    both = shutil.copytree(saved, tmp_path / "both")
    shutil.copy(hf / "model.safetensors", both)
    with pytest.raises(CheckpointError, match="must hold one model"):
        open_source(both)
    split = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24}
    for name, moe, upcycle in (
        ("pp2", {"num_moe_experts": 4}, {}),
        ("tp2-ep2-etp2", split, {"method": "split_random"}),
    ):
        world_size, parallel = LAYOUTS[name]
        settings = tree(tmp_path, hf, tokens, parallel=parallel, moe=moe, upcycle=upcycle)
        run_on_ranks(compare, build(RunConfig, settings), saved, world_size=world_size)


@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe"])
def test_a_moe_is_read_to_the_same_bits(tmp_path: Path, family: str):
    hf = save_moe(tmp_path / "hf", family)
    saved = tmp_path / "distributed"
    saved.mkdir()
    shutil.copy(hf / "config.json", saved)
    for name, fn, upcycle in (
        ("tp2-ep2", save, {"method": "keep"}),
        ("tp2-ep2-etp2", compare, {"method": "grow", "twins": "exact"}),
    ):
        world_size, parallel = LAYOUTS[name]
        settings = tree(tmp_path, hf, tmp_path / "tokens", parallel=parallel, upcycle=upcycle)
        settings["moe"] = {} if fn is save else {"num_moe_experts": 8}
        config = build(RunConfig, complete_from_source(settings))
        arguments = (config, saved, True) if fn is save else (config, saved)
        run_on_ranks(fn, *arguments, world_size=world_size)


def test_a_run_starts_from_it_and_asks_for_no_logits(tmp_path: Path):
    hf = save_dense(tmp_path / "hf")
    saved = tmp_path / "distributed"
    saved.mkdir()
    shutil.copy(hf / "config.json", saved)
    tokens = write_tokens(tmp_path / "tokens")
    run_on_ranks(save, build(RunConfig, tree(tmp_path, hf, tokens)), saved, True, world_size=1)
    short = {"parallel": {"expert_parallel_size": 2}, "train": {"steps": 2}}
    lines = [
        run_training(tree(tmp_path / name, folder, tokens, **short, upcycle={}), world_size=2)
        for name, folder in (("from-hf", hf), ("from-distributed", saved))
    ]
    assert [line["loss/lm"] for line in lines[0][1:]] == [line["loss/lm"] for line in lines[1][1:]]
    always = tree(tmp_path / "always", saved, tokens, **short, upcycle={"verify": "always"})
    with pytest.raises(ConfigError, match=r"upcycle.verify \(always\) needs a Hugging Face folder"):
        run_training(always, world_size=2)


def save(world: World, config: RunConfig, out: Path, apart: bool) -> None:
    from megatron_moe.parallel.groups import create_groups

    layout, groups = create_groups(config.parallel, seed=0)
    spec = read_spec(config.source.path)
    as_source = source_config(config, spec)
    (module,), _ = filled(as_source, config.source.path, layout, groups, world.rank)
    if spec.experts is None:
        # A model with experts somewhere keeps its layers apart; a dense one need not.
        module.config.moe_layer_freq = 1
        module.config.num_moe_experts = None
    metadata = {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": apart}
    dist_checkpointing.save(module.sharded_state_dict(metadata=metadata), str(out))


def compare(world: World, config: RunConfig, distributed: Path) -> None:
    from megatron_moe.parallel.groups import create_groups

    layout, groups = create_groups(config.parallel, seed=0)
    ours, ours_read = filled(config, distributed, layout, groups, world.rank)
    theirs, theirs_read = filled(config, config.source.path, layout, groups, world.rank)
    assert ours_read == theirs_read  # no more of the chunks than of safetensors
    for module, other in zip(ours, theirs, strict=True):
        expected = dict([*other.named_parameters(), *other.named_buffers()])
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            assert torch.equal(tensor, expected[name]), name
    dist.barrier()  # gloo fails a rank whose peer ends while it still connects


def filled(config, folder, layout, groups, rank):
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.model.build import build_model
    from megatron_moe.model.upcycle import upcycle

    dense = open_source(folder)
    assert isinstance(dense, DistributedSource) == (folder != config.source.path)
    dense.check_tensors(dict(dense_tensors(dense.spec)))
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    model = build_model(
        config, dense.spec, layout=layout, groups=groups, rank=rank, engine=TORCH_ON_CPU
    )
    for module in model.modules:
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))
    upcycle(model, dense, plan, layout=layout, rank=rank)
    return model.modules, dense.bytes_read
