"""Every method, under layouts that cut experts, layers and attention differently: the same bits.

The ranks' parts are put together under the global names that checkpoints use, without a file; and
saved, exported and compared as what leaves the project.
"""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from construction import CASES, make_plan, settings
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import save_dense
from torch import Tensor

from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.data import Data
from megatron_moe.config.moe import Method, Moe, Source, Upcycle
from megatron_moe.config.run import Parallel, Run, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.experts.file import PLAN_FILE, write_plan
from megatron_moe.experts.methods import METHODS as TABLE
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import open_mixed, open_safetensors
from megatron_moe.rules.check import violations
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, int]] = {  # of 4 ranks
    "dp4": {},
    "ep4": {"expert_parallel_size": 4},
    "tp2-ep2-etp2": {"tensor_parallel_size": 2, "expert_parallel_size": 2,
                     "expert_tensor_parallel_size": 2},
    "pp2-etp2": {"pipeline_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "cp2-etp4": {"context_parallel_size": 2, "expert_tensor_parallel_size": 4},
}  # fmt: skip

METHODS = [case for case, (_, upcycle) in CASES.items() if upcycle.get("method", "copy") == case]
"""A case of each method for a dense source."""
QUICK_LAYOUTS = ("tp2-ep2-etp2", "pp2-etp2")
EXPORTED = [(case, layout) for case in METHODS for layout in QUICK_LAYOUTS]
"""Under the layouts that cut most; the rest takes longer."""

NEURONS_READ = {  # a layer, of 96; "dp4" holds all experts, "ep4" one, "cp2-etp4" a quarter of each
    "copy": {"dp4": 96, "ep4": 96, "cp2-etp4": 24},
    "granular": {"dp4": 96, "ep4": 48, "cp2-etp4": 24},  # two replicas are read once
    "split_random": {"dp4": 96, "ep4": 24, "cp2-etp4": 24},
    "split_random-shared": {"dp4": 96, "ep4": 48, "cp2-etp4": 48},
    "split_clustered": {"dp4": 96, "ep4": 24, "cp2-etp4": 24},
    "sharing_inner": {"dp4": 128, "ep4": 32, "cp2-etp4": 32},  # experts overlap
    "sharing_inter": {"dp4": 96, "ep4": 48, "cp2-etp4": 48},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("dense")
    return [
        save_dense(root / name, seed=seed, num_hidden_layers=2, hidden_size=32, vocab_size=64)
        for seed, name in enumerate(("dense", "other"))
    ]


def run_config(run: Path, folders: list[Path], layout: str, moe: Moe, upcycle: Upcycle):
    mixed = [folders[1]] if upcycle.mix_with else []
    return RunConfig(
        run=Run(dir=run),
        source=Source(path=folders[0]),
        moe=moe,
        upcycle=upcycle.model_copy(update={"mix_with": mixed}),
        parallel=Parallel(**LAYOUTS[layout]),
        data=Data(path=folders[0] / "unused", seq_length=32),
        train=Train(steps=0, precision="fp32", global_batch_size=4),
        optimizer={"warmup_steps": 0},
    )


def test_weights_and_exports_are_the_same_bits(folders: list[Path], tmp_path: Path):
    """All methods in one world: starting ranks and groups is what takes time."""
    configs = run_configs(tmp_path, folders)
    run_on_ranks(check_layouts, configs, EXPORTED, world_size=4)
    compare_exports({pair: configs[pair] for pair in EXPORTED})


@pytest.mark.slow
def test_what_else_is_exported_is_the_same_bits(folders: list[Path], tmp_path: Path):
    configs = run_configs(tmp_path, folders)
    first = QUICK_LAYOUTS[0]
    pairs = [(c, name) for c, name in configs if (c, name) not in EXPORTED or name == first]
    run_on_ranks(check_layouts, configs, pairs, world_size=4)
    compare_exports({pair: configs[pair] for pair in pairs})


def run_configs(root: Path, folders: list[Path]) -> dict[tuple[str, str], RunConfig]:
    configs = {
        (case, layout): run_config(root / f"{case}-{layout}", folders, layout, *settings(case))
        for layout in LAYOUTS
        for case in CASES
    }
    spec = open_safetensors(folders[0]).spec
    for config in configs.values():
        assert not violations(config, spec, 4)
    return configs


def check_layouts(
    world: World, configs: dict[tuple[str, str], RunConfig], saved: list[tuple[str, str]]
) -> None:
    from megatron_moe.parallel.groups import create_groups, destroy_groups

    first: dict[str, dict[str, Tensor]] = {}
    for name, parallel in LAYOUTS.items():
        layout, groups = create_groups(Parallel(**parallel), seed=0)
        for case in CASES:
            config = configs[case, name]
            model, filled, plan = filled_model(config, layout, groups, world.rank)
            if (neurons := NEURONS_READ.get(case, {}).get(name)) is not None:
                assert filled.bytes_read == expected_bytes(config, neurons), (case, name)
            weights = global_weights(model, groups)
            if world.rank == 0:
                assert not any(tensor.isnan().any() for tensor in weights.values()), case
                expected = first.setdefault(case, weights)
                assert expected.keys() == weights.keys()
                other = [key for key in expected if not torch.equal(expected[key], weights[key])]
                assert not other, (case, name, other)
            if (case, name) in saved:
                save(config, model, plan, groups, rank=world.rank)
        destroy_groups()


def filled_model(config: RunConfig, layout: Any, groups: Any, rank: int) -> tuple[Any, Any, Any]:
    from megatron_moe.model.build import build_model
    from megatron_moe.model.routers import set_output_scales
    from megatron_moe.model.upcycle import check_coverage, upcycle

    dense = open_safetensors(config.source.path)
    mixed = open_mixed(dense, config.upcycle.mix_with)
    plan = make_plan(dense.spec, config.moe, config.upcycle, dense)
    model = build_model(
        config, dense.spec, layout=layout, groups=groups, rank=rank, engine=TORCH_ON_CPU
    )
    set_output_scales(model.modules, plan)
    for module in model.modules:
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))  # what is not filled shows
    filled = upcycle(model, dense, plan, layout=layout, rank=rank, mix_with=mixed)
    sources = 1 + len(mixed)
    expected = sources * len(dict(dense_tensors(dense.spec)))
    assert check_coverage(filled, dense, plan) == expected
    return model, filled, plan


def save(config: RunConfig, model: Any, plan: ExpertPlan, groups: Any, *, rank: int) -> None:
    """A checkpoint of step 0, as the run would write it."""
    from megatron_moe.checkpoint.sharded import Saver
    from megatron_moe.train.state import make_state

    if rank == 0 and plan.tables:
        write_plan(config.run.dir / PLAN_FILE, plan, source="drawn")
    state = make_state(config, model, groups)
    with Saver(config, plan_hash=plan.hash, say=lambda line: None) as saver:
        saver.save(state, groups)


def compare_exports(configs: dict[tuple[str, str], RunConfig]) -> None:
    """Files of the exported folders, tensor by tensor, with those of the case's first layout."""
    first: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for (case, layout), config in configs.items():
        out = config.run.dir / "hf"
        export_checkpoint(config.run.dir, out)
        tensors = {
            name: tensor
            for path in out.glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        settings_text = (out / "config.json").read_text()
        expected_text, expected = first.setdefault(case, (settings_text, tensors))
        assert settings_text == expected_text, (case, layout)
        assert tensors.keys() == expected.keys(), (case, layout)
        other = [key for key in tensors if not torch.equal(tensors[key], expected[key])]
        assert not other, (case, layout, other)
        shutil.rmtree(config.run.dir)


def test_every_method_is_exported():
    of_moe = {name for name, row in TABLE.items() if row.of_moe}  # test_moe_source.py
    assert set(METHODS) == set(get_args(Method)) - of_moe


def expected_bytes(config: RunConfig, neurons: int) -> int:
    """All that is not FFN once, and of every layer's FFN this many neurons."""
    dense = open_safetensors(config.source.path)
    spec = dense.spec
    neuron = 3 * spec.hidden_size * 4  # a row of gate and of up, a column of down, fp32
    skipped = spec.num_layers * (spec.ffn_hidden_size - neurons) * neuron
    return dense.source_bytes - skipped


def global_weights(model: Any, groups: Any) -> dict[str, Tensor]:
    """All weights under their global names, on rank 0."""
    mine = []
    for module in model.modules:
        state: Any = module.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        apply_factories(state)
        shards, _ = extract_matching_values(state, lambda value: isinstance(value, ShardedTensor))
        mine += list(leaves(shards))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    whole: dict[str, Tensor] = {}
    for key, shape, offset, data in (shard for shards in gathered for shard in shards):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return whole


def leaves(tree: Any):
    if isinstance(tree, ShardedTensor):
        if is_main_replica(tree.replica_id):
            data = tree.data.detach()
            data = data.reshape((1,) * tree.prepend_axis_num + tuple(data.shape))
            sizes = (slice(0, end - begin) for begin, end in zip(
                tree.global_offset, tree.global_shape, strict=True))  # fmt: skip
            yield tree.key, tree.global_shape, tree.global_offset, data[tuple(sizes)].clone()
    else:
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
