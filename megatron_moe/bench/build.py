"""Build what a benchmark times: the training state and its batches, real or random.

Shape letters of this module:

    S  seq_length   T  seq_length + 1
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.construct.complete import complete_plan
from megatron_moe.data.batches import Batch, micro_batches, slice_for_context_parallel
from megatron_moe.data.feed import DataRank, Feed
from megatron_moe.data.samples import Sample
from megatron_moe.data.texts import open_texts
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import open_mixed, open_safetensors
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.overlap import start_tp_overlap
from megatron_moe.model.routers import routers_in, set_output_scales
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.world import World
from megatron_moe.train.state import TrainState, make_state

Supply = Callable[[TrainState], list[Batch]]
"""Gives this rank's micro-batches of the next step."""


def make_timed_state(
    config: RunConfig,
    world: World,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    *,
    random: bool,
    balanced: bool,
) -> TrainState:
    """A state that trains: upcycled from the dense checkpoint, or of its shape and random.

    Args:
        config: The run; `rules.check` has passed it.
        world: This rank's place.
        layout: Who holds what.
        groups: This rank's process groups.
        random: Read nothing of the dense model but its config.json.
        balanced: Let random numbers choose the experts instead of the router's logits.
    """
    engine = engine_of(config.run.engine, world)
    spec = read_spec(config.source.path)
    if not engine.is_torch:
        start_tp_overlap(config, spec)
    model = build_model(config, spec, layout=layout, groups=groups, rank=world.rank, engine=engine)
    if random:
        _fill_at_random(model)
    else:
        _fill_from_checkpoint(model, config, layout, world.rank)
    if balanced:
        force_balance(model)
    return make_state(config, model, groups)


def _fill_from_checkpoint(
    model: Model, config: RunConfig, layout: ParallelLayout, rank: int
) -> None:
    dense = open_safetensors(config.source.path)
    dense.check_tensors(dict(dense_tensors(dense.spec)))
    plan = complete_plan(make_expert_plan(dense.spec, config.moe, config.upcycle), config, dense)
    set_output_scales(model.modules, plan)
    mix_with = open_mixed(dense, config.upcycle.mix_with)
    upcycle(model, dense, plan, layout=layout, rank=rank, mix_with=mix_with)


@torch.no_grad()
def _fill_at_random(model: Model) -> None:
    """Weights of the usual size, the same on every rank that holds the same name; norms of one."""
    for chunk in model.chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(0.0, model.spec.initializer_range, generator=generator)


def force_balance(model: Model) -> None:
    """Turn on Megatron-Core's switch for benchmarks: each token's logits are drawn at random."""
    for router in routers_in(*(chunk.module for chunk in model.chunks)):
        router.config.moe_router_force_load_balancing = True


def make_supply(
    config: RunConfig, spec: ModelSpec, groups: ProcessGroupCollection, *, random: bool
) -> Supply:
    """This rank's batches: of the run's text, or random tokens made once."""
    data_rank = DataRank.of(groups)
    pin = dist.get_backend() == "nccl"  # as training does
    if random:
        batches = _random_batches(config, spec.vocab_size, data_rank)
        if pin:
            batches = [batch.map(Tensor.pin_memory) for batch in batches]
        return lambda _: batches
    feed = Feed(open_texts(config, vocab_size=spec.vocab_size), config, data_rank, pin=pin)

    def supply(state: TrainState) -> list[Batch]:
        batches, state.blend = feed.next_step(state.blend)
        return batches

    return supply


class _RandomTokens:
    """Samples of random tokens, the same whoever asks."""

    def __init__(self, *, vocab_size: int, length: int, seed: int) -> None:
        self._vocab_size, self._length, self._seed = vocab_size, length, seed

    def __getitem__(self, k: int) -> Sample:
        ids_T = np.random.default_rng((self._seed, k)).integers(self._vocab_size, size=self._length)
        inputs = self._length - 1
        return Sample(
            ids_T=ids_T,
            loss_mask_S=np.ones(inputs, dtype=np.float32),
            position_ids_S=np.arange(inputs),
        )


def _random_batches(config: RunConfig, vocab_size: int, data_rank: DataRank) -> list[Batch]:
    train, seed = config.train, config.run.seed
    batches = micro_batches(
        _RandomTokens(vocab_size=vocab_size, length=config.data.seq_length + 1, seed=seed),
        position=0,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        dp_rank=data_rank.dp_rank,
        dp_size=data_rank.dp_size,
    )
    return [
        slice_for_context_parallel(batch, cp_rank=data_rank.cp_rank, cp_size=data_rank.cp_size)
        for batch in batches
    ]
