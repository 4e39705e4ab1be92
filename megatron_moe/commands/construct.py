"""Implement the command `construct`: measure the source model on text and write the plan file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import (
    check_solved_layers,
    gather_tables,
    merged_tables,
    tables_from_weights,
)
from megatron_moe.construct.finished import start
from megatron_moe.construct.fit import Fit, fit_table
from megatron_moe.construct.measure import Measurement, calibration_batch, world_sum
from megatron_moe.construct.measure_experts import ExpertMeasurement
from megatron_moe.construct.partial import PartialFiles
from megatron_moe.construct.place import partial_folder, publish, working_folder
from megatron_moe.construct.solve import LayerMeasurements, layer_table
from megatron_moe.construct.stream import LayerStream
from megatron_moe.data.samples import Text
from megatron_moe.data.texts import open_texts
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.experts.file import PLAN_FILE, read_measured_on, read_plan, write_plan
from megatron_moe.experts.from_source import check_ep, source_config
from megatron_moe.experts.methods import METHODS, measures
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan
from megatron_moe.experts.solved import plan_file
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
    assert config.upcycle.plan is not None
    path = plan_file(config.upcycle.plan)
    dense = open_source(config.source.path)
    dense.check_tensors(dict(dense_tensors(dense.spec)))
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    key = _key(config, dense)
    if _is_there(path, plan, key, dense, world):
        return
    texts = open_texts(config, vocab_size=dense.spec.vocab_size)
    if plan.recipe.fit:
        _check_distinct(config, texts.training)
    job = _Construction(config, world, dense, list(texts.training.values()), path, key)
    results: dict[str, Any] = {}
    if plan.recipe.source_experts:
        plan, results["experts"] = job.chosen(plan)
    elif measures(plan.recipe) == "text":
        plan, results["sequences_by_cluster"] = job.measured(plan)
    elif measures(plan.recipe) == "weights":
        plan = plan.with_tables(tables_from_weights(plan, dense))
    if plan.recipe.fit:
        plan, results["fit"] = job.fitted(plan)
    else:
        start(working_folder(path), job.key)
    if world.rank == 0:
        measured_on = {
            "samples": config.measure.samples,
            "seq_length": config.data.seq_length,
            "hidden_states": config.measure.hidden_states,
            "texts": list(texts.training),
            "settings": key,
            **results,
        }
        complete = working_folder(path) / PLAN_FILE
        write_plan(complete, plan, source=dense.fingerprint(), measured_on=measured_on)
        publish(path)
        console.print(f"wrote {path}: plan {plan.hash[:12]}")


def _check_distinct(config: RunConfig, texts: Mapping[str, Text]) -> None:
    """Check that no calibration sequence repeats; domains take turns.

    Raises:
        ConfigError: A sequence would both fit and judge the fit.
    """
    shortest = min(texts, key=lambda name: texts[name].num_chunks)
    chunks, samples = texts[shortest].num_chunks, config.measure.samples
    if samples > chunks * len(texts):
        raise ConfigError(
            f"measure.samples ({samples}) with upcycle.fit must be at most {chunks * len(texts)}: "
            f"text {shortest} has {chunks} sequences of data.seq_length "
            f"({config.data.seq_length}) tokens, and one that repeats would both fit and judge "
            f"the fit.\n  set measure.samples={chunks * len(texts)} or less, give more text, or "
            "set a shorter data.seq_length"
        )


@dataclass(frozen=True, slots=True)
class _Construction:
    """The input of both stages, on one rank."""

    config: RunConfig
    world: World
    dense: SourceCheckpoint
    texts: list[Text]
    path: Path
    key: str
    """Identifies settings and source."""

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
        partial = PartialFiles(partial_folder(self.path), self.key)
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
        partial = PartialFiles(partial_folder(self.path), self.key)
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
        folder = working_folder(self.path)
        start(folder, self.key)
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


def _is_there(
    path: Path, plan: ExpertPlan, key: str, dense: SourceCheckpoint, world: World
) -> bool:
    """Return whether these settings made the plan that is there; rank 0 says what it found.

    All ranks must call this.
    """
    answer = [False]
    if world.rank == 0:
        publish(path)
        if path.exists():
            answer = [_found(path, plan, key, dense)]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _found(path: Path, plan: ExpertPlan, key: str, dense: SourceCheckpoint) -> bool:
    try:
        if (read_measured_on(path) or {}).get("settings") != key:
            console.print(f"{path} was made with other settings, and is replaced at the end")
            return False
        earlier = read_plan(path, plan, source=dense.fingerprint())
        check_solved_layers(earlier, path, earlier.solved_layers)
    except CheckpointError as error:
        console.print(f"{str(error).splitlines()[0]}\nThe plan is constructed again")
        return False
    console.print(
        f"{path} is there: plan {earlier.hash[:12]}, made with these settings. If the text has "
        "changed, remove the file to construct it again"
    )
    return True


_WITHOUT_EFFECT: dict[str, Any] = {
    "run": {"dir"}, "upcycle": {"plan", "verify"}, "optimizer": True, "checkpoint": True,
    "guard": True, "log": True,
}  # fmt: skip
"""Settings that do not change what `construct` computes."""


def _key(config: RunConfig, dense: SourceCheckpoint) -> str:
    settings = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    text = json.dumps(settings, sort_keys=True) + dense.fingerprint()
    return hashlib.sha256(text.encode()).hexdigest()
