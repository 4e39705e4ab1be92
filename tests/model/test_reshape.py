"""Tests that reinitialized neurons keep the statistics of those they replace; others stay.

Shape letters: M neurons of an expert, m of them on one etp rank, D hidden_size, E experts.
"""

from pathlib import Path

import numpy as np
import torch
from ranks import run_on_ranks

from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.config.run import Parallel
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.runtime.world import World

NEURONS, HIDDEN = 1000, 64
STATISTICS = {"gate": (0.5, 0.1), "up": (-0.2, 0.3), "down": (0.0, 0.02)}
SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": HIDDEN,
        "intermediate_size": NEURONS, "num_attention_heads": 4, "vocab_size": 64,
    }
)  # fmt: skip
SHARED = Moe(
    num_moe_experts=2, moe_ffn_hidden_size=NEURONS, moe_shared_expert_intermediate_size=NEURONS
)
PLAN = make_expert_plan(SPEC, SHARED, Upcycle(method="qwen", reinit_ratio=0.3))


def test_redrawn_neurons_keep_mean_and_std(tmp_path: Path):
    """Experts are sharded with etp 2, and the shared expert over as many tp ranks.

    Mean and std are those of both halves together.
    """
    run_on_ranks(redraw, tmp_path, world_size=2)
    halves = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    mask_EM, shared_S = PLAN.layer(0).reinit_EM, PLAN.layer(0).reinit_S
    assert mask_EM is not None
    assert shared_S is not None
    assert len({tuple(mask_M) for mask_M in [*mask_EM, shared_S]}) == 3
    for expert, mask_M in enumerate([*mask_EM, shared_S]):
        assert mask_M.sum() == 300
        for name in STATISTICS:
            key = f"{name}.{expert}"
            now_MD = np.concatenate([half[key] for half in halves])
            was_MD = dense(name).numpy()
            np.testing.assert_array_equal(now_MD[~mask_M], was_MD[~mask_M])
            assert (now_MD[mask_M] != was_MD[mask_M]).all()
            mean, std = was_MD[mask_M].mean(), was_MD[mask_M].std()
            for fresh_mD in (
                half[key][part] for half, part in zip(halves, mask_M.reshape(2, -1), strict=True)
            ):
                # With n draws the mean errs by std / sqrt(n), the std by std / sqrt(2 n).
                error = std / fresh_mD.size**0.5
                assert abs(fresh_mD.mean() - mean) < 4 * error
                assert abs(fresh_mD.std() - std) < 4 * error / 2**0.5


def dense(name: str) -> torch.Tensor:
    """Return a matrix with a row per neuron; its halves differ, so using one would be wrong."""
    mean, std = STATISTICS[name]
    drawn = torch.Generator().manual_seed(len(name))
    normal_MD = torch.randn(NEURONS, HIDDEN, generator=drawn)
    normal_MD[: NEURONS // 2] += 1
    return normal_MD * std + mean


def redraw(world: World, out: Path) -> None:
    from megatron_moe.model.reshape import LocalExpert, LocalLayer, reshape_values
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.parallel.shards import ShardIndex

    create_groups(Parallel(expert_tensor_parallel_size=2), seed=0)
    part = ShardIndex(world.rank, 2)
    gate, up, down = (dense(name)[part.slice_of(NEURONS)] for name in STATISTICS)
    experts = [
        LocalExpert(
            expert, torch.cat([gate, up]), down.T.contiguous(), part, size=NEURONS, counts=True
        )
        for expert in (0, 1, 2)
    ]
    local = LocalLayer(0, PLAN.layer(0), experts[:2], torch.zeros(2, HIDDEN), experts[2])
    reshape_values([local], PLAN.recipe)
    arrays = {
        f"{name}.{expert.expert}": matrix.numpy()
        for expert in experts
        for name, matrix in zip(STATISTICS, expert.matrices, strict=True)
    }
    np.savez(out / f"{world.rank}.npz", **arrays)
