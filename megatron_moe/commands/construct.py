"""Implement the command `construct`: measure the source model on text and write the plan file."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.config.load import dump
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import gather_tables, merged_tables, tables_from_weights
from megatron_moe.construct.finished import remove_records, start
from megatron_moe.construct.fit import Fit, fit_table
from megatron_moe.construct.measure import Measurement, calibration_batch, world_sum
from megatron_moe.construct.measure_experts import ExpertMeasurement
from megatron_moe.construct.partial import PartialFiles
from megatron_moe.construct.solve import LayerMeasurements, layer_table
from megatron_moe.construct.stream import LayerStream
from megatron_moe.data.samples import Text
from megatron_moe.data.texts import open_texts
from megatron_moe.experts.file import write_plan
from megatron_moe.experts.from_source import check_ep, source_config
from megatron_moe.experts.methods import METHODS, measures
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan
from megatron_moe.experts.solved import solved_folder
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.log import RoundProgress, console
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.groups import create_groups, destroy_groups
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.world import World
from megatron_moe.source.open import open_source


def construct(config: RunConfig, world: World) -> None:
    """Measure the source model, solve for what `upcycle.fit` names, and write ``upcycle.plan``.

    Runs on every rank. The source model is sharded by the settings of ``parallel`` while it is
    measured; a fit has one layer in memory and divides the text among all ranks.
    """
    path = config.upcycle.plan
    assert path is not None
    dense = open_source(config.source.path)
    dense.check_tensors(dict(dense_tensors(dense.spec)))
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    texts = open_texts(config, vocab_size=dense.spec.vocab_size)
    job = _Construction(config, world, dense, list(texts.training.values()), path)
    results: dict[str, Any] = {}
    if plan.recipe.source_experts:
        plan, results["experts"] = job.chosen(plan)
    elif measures(plan.recipe) == "text":
        plan, results["sequences_by_cluster"] = job.measured(plan)
    elif measures(plan.recipe) == "weights":
        plan = plan.with_tables(tables_from_weights(plan, dense))
    if plan.recipe.fit:
        plan, results["fit"] = job.fitted(plan)
    if world.rank == 0:
        measured_on = {
            "samples": config.measure.samples,
            "seq_length": config.data.seq_length,
            "hidden_states": config.measure.hidden_states,
            "texts": list(texts.training),
            **results,
        }
        write_plan(path, plan, source=dense.fingerprint(), measured_on=measured_on)
        remove_records(solved_folder(path))
        console.print(f"wrote {path}: plan {plan.hash[:12]}")


@dataclass(frozen=True, slots=True)
class _Construction:
    """The input of both stages, on one rank."""

    config: RunConfig
    world: World
    dense: SourceCheckpoint
    texts: list[Text]
    path: Path

    def source_model(self) -> tuple[Model, RunConfig, ProcessGroupCollection]:
        """Build this rank's shard of the source model; return its configuration and groups too."""
        config, dense, rank = self.config, self.dense, self.world.rank
        layout, groups = create_groups(config.parallel, seed=config.run.seed)
        as_source = source_config(config, dense.spec)
        model = build_model(
            as_source, dense.spec, layout=layout, groups=groups, rank=rank,
            engine=engine_of(config.run.engine, self.world),
        )  # fmt: skip
        unchanged = make_expert_plan(dense.spec, as_source.moe, as_source.upcycle)
        upcycle(model, dense, unchanged, layout=layout, rank=rank)
        return model, as_source, groups

    def chosen(self, plan: ExpertPlan) -> tuple[ExpertPlan, dict[str, list[int]]]:
        """Return the plan with the experts that their scores on text choose, by layer.

        Merged experts are listed by source expert: the one that it became a part of.
        """
        config, choose = self.config, plan.recipe.choose
        check_ep(config, self.dense.spec)
        model, as_source, groups = self.source_model()
        measurement = ExpertMeasurement(
            model, as_source, self.texts, groups, gradients=choose == "utility"
        )
        partial = PartialFiles(_partial_folder(self.path), _key(config, self.dense))
        with RoundProgress("measuring experts", rank=self.world.rank) as progress:
            measurement.run(partial, progress.show)
        scores_LO = measurement.scores(choose)
        partial.remove()
        if choose == "merge":
            tables = merged_tables(plan, scores_LO, self.dense)
            members = {i: table.into_O for i, table in tables.items()}
        else:
            tables = {}
            for layer in plan.recipe.moe_layers:
                evidence = Evidence(score_O=scores_LO[layer])
                part = METHODS[plan.recipe.method].partition(plan.recipe, layer, evidence)
                tables[layer] = LayerTable(expert_E=part.expert_E)
            members = {i: table.expert_E for i, table in tables.items()}
        destroy_groups()
        listed = {str(i): ids.tolist() for i, ids in members.items() if ids is not None}
        return plan.with_tables(tables), listed

    def measured(self, plan: ExpertPlan) -> tuple[ExpertPlan, list[int] | None]:
        """Return the plan with the tables that the dense model's activations give.

        Also returns the number of sequences of each cluster, if the method needs clusters.
        """
        config, dense, rank = self.config, self.dense, self.world.rank
        model, as_source, groups = self.source_model()
        measurement = Measurement(
            model, as_source, self.texts, groups, clusters=config.moe.num_moe_experts,
            seed=config.upcycle.seed, by_cluster=METHODS[plan.recipe.method].by_cluster,
        )  # fmt: skip
        partial = PartialFiles(_partial_folder(self.path), _key(config, dense))
        with RoundProgress("measuring", rank=rank) as progress:
            cluster_N = measurement.run(partial, progress.show)
        sizes = None if cluster_N is None else np.bincount(cluster_N).tolist()
        tables = _solved(plan, measurement, dense, config)
        partial.remove()
        destroy_groups()
        return plan.with_tables(tables), sizes

    def fitted(self, plan: ExpertPlan) -> tuple[ExpertPlan, dict[str, Any]]:
        """Return the plan with what was solved for, and how well each layer fits; print a table."""
        config, world = self.config, self.world
        folder = solved_folder(self.path)
        start(folder, _key(config, self.dense))
        fit = Fit(
            plan=plan, moe=config.moe, dense=self.dense,
            stream=LayerStream(
                config, self.dense, world.rank, engine_of(config.run.engine, world)
            ),
            batches=[
                calibration_batch(self.texts, number)
                for number in range(world.rank, config.measure.samples, world.size)
            ],
            first=world.rank, folder=folder,
        )  # fmt: skip
        with RoundProgress("fitting", rank=world.rank) as progress:
            tables, fits = fit.run(progress.show)
            progress.say(fit_table(fits))
        destroy_groups()
        records = {str(layer): asdict(result) for layer, result in fits.items()}
        return plan.with_tables(tables, solved=folder), records


def _solved(
    plan: ExpertPlan, measurement: Measurement, dense: SourceCheckpoint, config: RunConfig
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


def _key(config: RunConfig, dense: SourceCheckpoint) -> str:
    return hashlib.sha256((dump(config) + dense.fingerprint()).encode()).hexdigest()
