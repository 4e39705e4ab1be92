"""The command `analyze`: held-out text through a run's checkpoints, and their experts compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_moe.analyze import load
from megatron_moe.analyze.collect import Collector, Routed
from megatron_moe.analyze.record import (
    Analysis,
    Distances,
    Similarities,
    path_of,
    write_analysis,
)
from megatron_moe.analyze.similarity import Similarity, layer_similarity
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.restored import Restored, restored_model
from megatron_moe.checkpoint.sharded import restore_weights
from megatron_moe.config.run import RunConfig
from megatron_moe.config.train import Lora
from megatron_moe.data.feed import DataRank, Feed
from megatron_moe.data.samples import Text
from megatron_moe.data.texts import Texts, open_text, open_texts
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.hf.reader import SourceCheckpoint, open_mixed
from megatron_moe.runtime.world import World
from megatron_moe.source.open import open_source

Say = Callable[[str], None]


def analyze(
    config: RunConfig,
    world: World,
    checkpoints: Sequence[Path],
    *,
    sets: Mapping[str, Path],
    say: Say,
) -> list[Analysis]:
    """Analyze checkpoints of one run and write a file for each; runs on every rank.

    Args:
        config: The run, maybe under another layout; `rules.check` has passed it.
        world: This rank's place in the joined job.
        checkpoints: Folders, in the order in which they are read.
        sets: Texts besides the run's domains, by name.
        say: Tells the operator how far it is, on rank 0.

    Raises:
        ConfigError: There is no text to read, or a set is named like a domain.
    """
    restored = restored_model(config, world, checkpoints[0])
    texts = _texts(config, sets, restored.model.spec.vocab_size)
    dense = _dense(config, say)
    result = []
    for place, checkpoint in enumerate(checkpoints):
        if place:
            restored = _moved(restored, checkpoint, config)
        routed = _read(restored, config, texts, say)
        alike = _similarities(restored, checkpoint, dense, config.lora)
        analysis = _analysis(restored, checkpoint, config, routed, alike, sets)
        if world.rank == 0:
            path = path_of(config.run.dir, analysis.step)
            write_analysis(analysis, path)
            say(f"wrote {path}")
        result.append(analysis)
    return result


def _moved(restored: Restored, checkpoint: Path, config: RunConfig) -> Restored:
    """Load the weights of another checkpoint into the model."""
    progress = restore_weights(
        restored.model, checkpoint, config, restored.groups, plan_hash=restored.plan.hash
    )
    return replace(restored, progress=progress)


def _texts(config: RunConfig, sets: Mapping[str, Path], vocab_size: int) -> dict[str, Text]:
    """Held-out texts of the run's domains, then the sets."""
    held_out = open_texts(config, vocab_size=vocab_size).validation
    if not held_out and not sets:
        raise ConfigError(
            "the run holds no text out to analyze its routers with.\n"
            "  add data.validation_fraction=0.02 or data.validation_path=FILE, or name texts: "
            "--set NAME=FILE"
        )
    if twice := sorted(held_out.keys() & sets.keys()):
        raise ConfigError(f"--set names {', '.join(twice)}, which the run's domains are named too")
    others = {n: open_text(path, config, vocab_size=vocab_size) for n, path in sets.items()}
    return {**held_out, **others}


def _dense(config: RunConfig, say: Say) -> list[SourceCheckpoint] | None:
    """Open the dense source of the experts, if its weights still exist."""
    try:
        dense = open_source(config.source.path)
        return [dense, *open_mixed(dense, config.upcycle.mix_with)]
    except CheckpointError as error:
        say(f"experts are not compared with the source weights: {str(error).splitlines()[0]}")
        return None


def _read(
    restored: Restored, config: RunConfig, texts: Mapping[str, Text], say: Say
) -> dict[str, Routed]:
    model, groups = restored.model, restored.groups
    layers = restored.plan.recipe.moe_layers
    collector = Collector(model, restored.modules, config, groups, layers=layers)
    judged = Texts(training={}, validation=dict(texts), references=None, remarks=[])
    feed = Feed(judged, config, DataRank.of(groups))
    result = {}
    for name, text in texts.items():
        samples = min(config.data.validation_samples, text.num_chunks)
        result[name] = collector.read(feed.held_out(name), num_samples=samples)
        say(f"{name}: {result[name].tokens:,} tokens, loss {result[name].loss:.4f}")
    return result


def _similarities(
    restored: Restored, checkpoint: Path, dense: Sequence[SourceCheckpoint] | None, lora: Lora
) -> dict[int, Similarity]:
    """Compare the experts of every MoE layer; ranks take the layers in turn and share results."""
    mine = {}
    with GlobalTensors(checkpoint) as tensors:
        for layer in restored.plan.recipe.moe_layers[dist.get_rank() :: dist.get_world_size()]:
            mine[layer] = layer_similarity(tensors, restored.plan, layer, dense, lora=lora)
    gathered: list[dict[int, Similarity]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {layer: result for part in gathered for layer, result in part.items()}


def _analysis(
    restored: Restored,
    checkpoint: Path,
    config: RunConfig,
    routed: Mapping[str, Routed],
    alike: Mapping[int, Similarity],
    sets: Mapping[str, Path],
) -> Analysis:
    counts_ZHLE = np.stack([result.chosen_HLE.numpy() for result in routed.values()])
    counts_ZLE = counts_ZHLE.sum(axis=1)
    apart_LZZ = load.distances(counts_ZLE)
    layers = list(restored.plan.recipe.moe_layers)
    together = [result.together_LEE for result in routed.values()]
    dense = [x.tolist() for layer in layers if (x := alike[layer].to_dense_E) is not None]

    def by_domain(values: Any) -> dict[str, Any]:
        return dict(zip(routed, _plain(values), strict=True))

    return Analysis(
        checkpoint=str(checkpoint),
        step=restored.progress.step,
        seq_length=config.data.seq_length,
        layers=layers,
        num_experts=config.moe.num_moe_experts,
        topk=config.moe.moe_router_topk,
        domains=list(routed),
        evaluation_sets=list(sets),
        tokens={name: result.tokens for name, result in routed.items()},
        loss={name: result.loss for name, result in routed.items()},
        counts=by_domain(counts_ZLE),
        counts_of_halves=by_domain(counts_ZHLE),
        dropped={name: result.dropped_L.tolist() for name, result in routed.items()},
        entropy=by_domain(load.entropy(counts_ZLE)),
        max_over_mean=by_domain(load.max_over_mean(counts_ZLE)),
        dead=by_domain(load.dead(counts_ZLE)),
        confidence={n: _plain(r.confidence_L / max(r.tokens, 1)) for n, r in routed.items()},
        coactivation=sum(together[1:], start=together[0]).tolist(),
        distances=Distances(
            layers=_plain(apart_LZZ),
            mean=_plain(apart_LZZ.mean(axis=0)),
            within=by_domain(load.distance_of_halves(counts_ZHLE)),
        ),
        similarity=Similarities(
            between_experts=[_plain(alike[layer].between_EE) for layer in layers],
            to_dense=_plain(dense) if dense else None,
        ),
    )


def _plain(values: Any) -> list[Any]:
    """Lists of numbers; fractions to six digits, as far as layouts agree."""
    array = np.asarray(values)
    return (array if array.dtype.kind == "i" else array.round(6)).tolist()
