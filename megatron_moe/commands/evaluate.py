"""Compute held-out losses by domain for the source model, the MoE at step 0, and a checkpoint.

All three use the validation sequences of training. transformers runs the whole source model on rank
0. For step 0, upcycling overwrites the checkpoint's weights; it gives the same bits under every
layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moe.checkpoint.restored import Restored, restored_model
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import plan_on_text
from megatron_moe.data.feed import DataRank, Feed
from megatron_moe.data.reference import dense_losses
from megatron_moe.data.texts import open_texts
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.evaluate.record import Evaluation, Figures
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.reader import SourceCheckpoint, open_mixed
from megatron_moe.hf.spec import read_spec
from megatron_moe.model.routers import expert_biases
from megatron_moe.model.upcycle import upcycle
from megatron_moe.runtime.world import World
from megatron_moe.source.open import DistributedSource, has_weights, open_source
from megatron_moe.train.step import mean_loss


def evaluate(config: RunConfig, world: World, checkpoint: Path) -> Evaluation:
    """Evaluate a checkpoint on the run's held-out text; runs on every rank of any layout.

    Args:
        config: Configuration from `config.judging` that passed `rules.check`.
        world: This rank in the joined job.
        checkpoint: Checkpoint folder.

    Returns:
        All results on rank 0; on other ranks, without the values that only rank 0 computes.

    Raises:
        ConfigError: The run has no held-out text.
    """
    texts = open_texts(config, vocab_size=read_spec(config.source.path).vocab_size)
    if not texts.validation:
        raise ConfigError(
            "the run has no held-out text to evaluate on.\n"
            "  set data.validation_path=FILE, or data.validation_fraction"
        )
    dense, remarks = _dense(config)
    losses_dense = None
    if dense is not None and not isinstance(dense, DistributedSource):
        losses_dense = (
            dense_losses(config, texts.validation, device=world.device) if world.rank == 0 else {}
        )
        dist.barrier()
    elif dense is not None:
        remarks.append(
            f"source: transformers cannot load a distributed checkpoint ({dense.folder})"
        )

    restored = restored_model(config, world, checkpoint)
    feed = Feed(texts, config, DataRank.of(restored.groups))
    losses = _losses(config, restored, feed)
    losses_step_0 = None
    if dense is not None:
        try:
            plan = _plan_of_step_0(restored.plan, config, dense)
        except CheckpointError as error:
            remarks.append(f"step 0: {error}")
        else:
            _upcycle_again(config, world, restored, plan, dense)
            losses_step_0 = _losses(config, restored, feed)
    return _evaluation(
        checkpoint,
        restored,
        config,
        world,
        feed,
        [losses_dense, losses_step_0, losses],
        remarks,
    )


def _dense(config: RunConfig) -> tuple[SourceCheckpoint | None, list[str]]:
    if has_weights(config.source.path):
        return open_source(config.source.path), []
    missing = f"source, step 0: the weights of the source model are not in {config.source.path}"
    return None, [f"{missing} (set source.path=FOLDER to use another folder)"]


def _losses(config: RunConfig, restored: Restored, feed: Feed) -> dict[str, float]:
    return {
        name: mean_loss(
            restored.modules, feed.held_out(name), config, restored.model, restored.groups
        )
        for name in feed.texts.validation
    }


def _plan_of_step_0(plan: ExpertPlan, config: RunConfig, dense: SourceCheckpoint) -> ExpertPlan:
    """Return the plan with its solved matrices, which are beside ``upcycle.plan`` alone.

    Raises:
        CheckpointError: That plan is missing, or is another one.
    """
    path = config.upcycle.plan
    if not plan.solved_layers or path is None:
        return plan
    whole, problem = plan, None
    try:
        whole = plan_on_text(path, replace(plan, tables={}), dense)
    except CheckpointError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # each rank checks other layers
    if whole.hash != plan.hash:
        problems.append(f"{path} is another plan than the run started from")
    if message := next(filter(None, problems), None):
        raise CheckpointError(message)
    return whole


def _upcycle_again(
    config: RunConfig,
    world: World,
    restored: Restored,
    plan: ExpertPlan,
    dense: SourceCheckpoint,
) -> None:
    for bias_E, _ in expert_biases(restored.model.modules):
        bias_E.zero_()
    upcycle(
        restored.model,
        dense,
        plan,
        layout=restored.layout,
        rank=world.rank,
        mix_with=open_mixed(dense, config.upcycle.mix_with),
    )


def _evaluation(
    checkpoint: Path,
    restored: Restored,
    config: RunConfig,
    world: World,
    feed: Feed,
    losses: list[dict[str, float] | None],
    remarks: list[str],
) -> Evaluation:
    sizes = feed.held_out_sizes if world.rank == 0 else {}
    if any(size.bytes is None for size in sizes.values()):
        remarks.append(f"bits per byte: there is no tokenizer in {config.source.path}")

    def figures(by_domain: dict[str, float]) -> dict[str, Figures]:
        return {
            name: {"tokens": size.tokens, "bytes": size.bytes, **size.figures(by_domain[name])}
            for name, size in sizes.items()
        }

    dense, step_0, trained = (None if model is None else figures(model) for model in losses)
    assert trained is not None
    return Evaluation(
        checkpoint=str(checkpoint),
        step=restored.progress.step,
        seq_length=config.data.seq_length,
        domains=trained,
        dense=dense,
        step_0=step_0,
        remarks=(*feed.texts.remarks, *remarks),
    )
