"""Evaluate MoEs constructed from SmolLM2 before any training step, by method and rescale.

The dense model is measured once, and all plans are solved from these measurements.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import complete_or_absent

from megatron_moe.config.judging import dense_config
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.measure import Measurement
from megatron_moe.construct.partial import PartialFiles
from megatron_moe.construct.solve import LayerMeasurements, layer_table
from megatron_moe.data.feed import DataRank, Feed
from megatron_moe.data.texts import Texts, open_texts
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.hf.spec import read_spec
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.routers import set_output_scales
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.groups import create_groups
from megatron_moe.rules.check import check
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World
from megatron_moe.source.open import open_source
from megatron_moe.train.step import mean_loss
from research.study.cases import Case
from research.study.runs import PRETRAIN, on_one_thread, settings, write_result

SAMPLES, HIDDEN_STATES = 40, 1280
"""Number of sequences to measure, and of layer inputs to keep."""
HELD_OUT = 4
"""Held-out sequences of each domain for evaluation."""
SEED = 0


def config_of(case: Case, run_dir: Path, dense: Path, tokens: Path) -> RunConfig:
    """Return the configuration of a case; its schedule is not used."""
    tree = settings(case, run_dir, dense, tokens, PRETRAIN, seed=SEED)
    tree["measure"] = {"samples": SAMPLES, "hidden_states": HIDDEN_STATES, "interval": 10}
    tree["data"] |= {"validation_fraction": 0.3, "validation_samples": HELD_OUT}
    tree["train"] |= {"micro_batch_size": 1}
    config = build(RunConfig, tree)
    check(config, read_spec(config.source.path), 1)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    return config


def measure(config: RunConfig, out: Path) -> None:
    """Write importance, activity and inputs of each layer to ``out``/LAYER.npz."""
    on_one_thread(partial(_measure, config, out))


def _measure(config: RunConfig, out: Path, world: World) -> None:
    layout, groups = create_groups(config.parallel, seed=SEED)
    dense = open_source(config.source.path)
    as_dense = dense_config(config)
    model = build_model(
        as_dense, dense.spec, layout=layout, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    plan = make_expert_plan(dense.spec, as_dense.moe, as_dense.upcycle)
    upcycle(model, dense, plan, layout=layout, rank=world.rank)
    texts = list(open_texts(config, vocab_size=dense.spec.vocab_size).training.values())
    measuring = Measurement(
        model, as_dense, texts, groups, clusters=config.moe.num_moe_experts, seed=SEED,
        by_cluster=True,
    )  # fmt: skip
    kept = PartialFiles(out.with_name(f".{out.name}.measuring"), "smollm2")
    measuring.run(kept, lambda done, total: print(f"{done} of {total}", flush=True))
    actual = measuring.sums
    with complete_or_absent(out) as staging:
        for layer in range(dense.spec.num_layers):
            np.savez(
                staging / f"{layer}.npz",
                inputs=actual.inputs[layer].numpy(),
                importance=actual.importance_LCF[layer].numpy(),
                activity=actual.activity_LCF[layer].numpy(),
            )
    kept.remove()


def judge(case: Case, config: RunConfig, measured: Path, result: Path) -> None:
    """Construct the case and write its held-out losses."""
    on_one_thread(partial(_judge, case, config, measured, result))


def _judge(case: Case, config: RunConfig, measured: Path, result: Path, world: World) -> None:
    start = time.monotonic()
    layout, groups = create_groups(config.parallel, seed=SEED)
    dense = open_source(config.source.path)
    plan = _solved(
        make_expert_plan(dense.spec, config.moe, config.upcycle), config, dense, measured
    )
    model = build_model(
        config, dense.spec, layout=layout, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    set_output_scales(model.modules, plan)
    upcycle(model, dense, plan, layout=layout, rank=world.rank)
    texts = open_texts(config, vocab_size=dense.spec.vocab_size)
    losses = _losses(config, texts, model, groups)
    scales = [table.output_scale for table in plan.tables.values() if table.output_scale]
    write_result(
        result,
        {
            "case": case.name,
            "shape": case.shape,
            "loss": round(sum(losses.values()) / len(losses), 5),
            "domains": losses,
            "tokens": len(losses) * HELD_OUT * config.data.seq_length,
            "calibrated": [round(min(scales), 3), round(max(scales), 3)] if scales else None,
            "seconds": time.monotonic() - start,
        },
    )


def _solved(
    plan: ExpertPlan, config: RunConfig, dense: SourceCheckpoint, measured: Path
) -> ExpertPlan:
    recipe = plan.recipe
    if plan.needs == "nothing":
        return plan
    tables = {}
    for layer in recipe.moe_layers:
        with np.load(measured / f"{layer}.npz") as actual:
            of_layer = LayerMeasurements(
                torch.from_numpy(actual["inputs"]), actual["importance"], actual["activity"]
            )
        tables[layer] = layer_table(plan, layer, of_layer, dense, config.moe)
    return plan.with_tables(tables)


def _losses(config: RunConfig, texts: Texts, model: Model, groups: Any) -> dict[str, float]:
    feed = Feed(texts, config, DataRank(dp_rank=0, dp_size=1, cp_rank=0, cp_size=1))
    return {
        name: round(mean_loss(model.modules, feed.held_out(name), config, model, groups), 5)
        for name in texts.validation
    }
