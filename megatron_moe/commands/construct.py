"""Implement the command `construct`: measure the dense model on text and write the plan file."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.judging import dense_config
from megatron_moe.config.load import dump
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import gather_tables, tables_from_weights
from megatron_moe.construct.finished import remove_records, start
from megatron_moe.construct.fit import Fit, fit_table
from megatron_moe.construct.measure import Measurement, calibration_batch, world_sum
from megatron_moe.construct.partial import PartialFiles
from megatron_moe.construct.solve import LayerMeasurements, layer_table
from megatron_moe.construct.stream import LayerStream
from megatron_moe.data.texts import Texts, open_texts
from megatron_moe.experts.file import write_plan
from megatron_moe.experts.methods import METHODS, measures
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.experts.solved import solved_folder
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import DenseCheckpoint
from megatron_moe.log import RoundProgress, console
from megatron_moe.model.build import build_model
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.groups import create_groups, destroy_groups
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.world import World
from megatron_moe.source.dense import open_dense


def construct(config: RunConfig, world: World) -> None:
    """Measure the dense model, solve for what `upcycle.fit` names, and write ``upcycle.plan``.

    Runs on every rank. The dense model is sharded by the settings of ``parallel`` while neurons are
    measured; a fit has one layer in memory and divides the text among all ranks.
    """
    assert config.upcycle.plan is not None
    dense = open_dense(config.source.path)
    dense.check_tensors(dict(dense_tensors(dense.spec)))
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    texts = open_texts(config, vocab_size=dense.spec.vocab_size)
    measured_on: dict[str, Any] = {
        "samples": config.measure.samples,
        "seq_length": config.data.seq_length,
        "hidden_states": config.measure.hidden_states,
        "texts": list(texts.training),
    }
    if measures(plan.recipe) == "text":
        plan = _measured(plan, dense, config, world, texts, measured_on)
    elif measures(plan.recipe) == "weights":
        plan = plan.with_tables(tables_from_weights(plan, dense))
    if plan.recipe.fit:
        plan = _fitted(plan, dense, config, world, texts, measured_on)
    if world.rank == 0:
        write_plan(config.upcycle.plan, plan, source=dense.fingerprint(), measured_on=measured_on)
        remove_records(solved_folder(config.upcycle.plan))
        console.print(f"wrote {config.upcycle.plan}: plan {plan.hash[:12]}")


def _measured(
    plan: ExpertPlan,
    dense: DenseCheckpoint,
    config: RunConfig,
    world: World,
    texts: Texts,
    measured_on: dict[str, Any],
) -> ExpertPlan:
    """Return the plan with the tables that the dense model's activations give."""
    assert config.upcycle.plan is not None
    layout, groups = create_groups(config.parallel, seed=config.run.seed)
    as_dense = dense_config(config)
    engine = engine_of(config.run.engine, world)
    model = build_model(
        as_dense, dense.spec, layout=layout, groups=groups, rank=world.rank, engine=engine
    )
    unchanged = make_expert_plan(dense.spec, as_dense.moe, as_dense.upcycle)
    upcycle(model, dense, unchanged, layout=layout, rank=world.rank)
    measurement = Measurement(
        model,
        as_dense,
        list(texts.training.values()),
        groups,
        clusters=config.moe.num_moe_experts,
        seed=config.upcycle.seed,
        by_cluster=METHODS[plan.recipe.method].by_cluster,
    )
    partial = PartialFiles(_partial_folder(config.upcycle.plan), _key(config, dense))
    with RoundProgress("measuring", rank=world.rank) as progress:
        cluster_N = measurement.run(partial, progress.show)
    if cluster_N is not None:
        sizes = [int((cluster_N == c).sum()) for c in set(cluster_N.tolist())]
        measured_on["sequences_by_cluster"] = sizes
    tables = _solved(plan, measurement, dense, config)
    partial.remove()
    destroy_groups()
    return plan.with_tables(tables)


def _fitted(
    plan: ExpertPlan,
    dense: DenseCheckpoint,
    config: RunConfig,
    world: World,
    texts: Texts,
    measured_on: dict[str, Any],
) -> ExpertPlan:
    """Return the plan with routers and ``down`` matrices solved for, and print a table."""
    assert config.upcycle.plan is not None
    folder = solved_folder(config.upcycle.plan)
    start(folder, _key(config, dense))
    numbers = range(world.rank, config.measure.samples, world.size)
    fit = Fit(
        plan=plan,
        moe=config.moe,
        dense=dense,
        stream=LayerStream(config, dense, world.rank, engine_of(config.run.engine, world)),
        batches=[calibration_batch(list(texts.training.values()), n) for n in numbers],
        first=world.rank,
        folder=folder,
    )
    with RoundProgress("fitting", rank=world.rank) as progress:
        tables, fits = fit.run(progress.show)
        progress.say(fit_table(fits))
    measured_on["fit"] = {str(layer): asdict(result) for layer, result in fits.items()}
    destroy_groups()
    return plan.with_tables(tables, solved=folder)


def _solved(
    plan: ExpertPlan, measurement: Measurement, dense: DenseCheckpoint, config: RunConfig
) -> dict[int, Any]:
    """Compute the layers' tables; layers are assigned to ranks in turn."""
    sums = measurement.sums
    importance_LCF, activity_LCF = world_sum(sums.importance_LCF), world_sum(sums.activity_LCF)
    zeros = torch.zeros_like(next(iter(sums.inputs.values())))
    tables = {}
    for turn, layer in enumerate(plan.recipe.moe_layers):
        inputs_TD = world_sum(sums.inputs.get(layer, zeros))
        if turn % dist.get_world_size() == dist.get_rank():
            measured = LayerMeasurements(
                inputs_TD, importance_LCF[layer].numpy(), activity_LCF[layer].numpy()
            )
            tables[layer] = layer_table(plan, layer, measured, dense, config.moe)
    return gather_tables(tables)


def _partial_folder(plan: Path) -> Path:
    return plan.with_name(f".{plan.name}.measuring")


def _key(config: RunConfig, dense: DenseCheckpoint) -> str:
    return hashlib.sha256((dump(config) + dense.fingerprint()).encode()).hexdigest()
