#!/usr/bin/env python3
"""The clusters of every layer on two ranks, as `megatron-moe train` finds them at its start."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_moe.runtime import cpu

cpu.install()

from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import tables_from_weights
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.runtime.world import World, run_local_ranks


def main() -> None:
    """Fork both ranks and cluster."""
    config = load(RunConfig, Path(sys.argv[1]))
    run_local_ranks(lambda world: _cluster(config, world), ranks=2, device="cpu")


def _cluster(config: RunConfig, world: World) -> None:
    dense = open_safetensors(config.source.path)
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    tables = tables_from_weights(plan, dense)
    assert len(tables) == dense.spec.num_layers, world.rank


if __name__ == "__main__":
    main()
