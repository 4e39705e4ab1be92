"""Fill a model from the source checkpoint, verify it, and write its receipt."""

from __future__ import annotations

import math
import time

import torch

from megatron_moe.commands.job import Job
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.against_dense import (
    AgainstDense,
    ComparisonJob,
    compare_layers_and_losses,
)
from megatron_moe.data.texts import Texts
from megatron_moe.errors import ConfigError
from megatron_moe.experts.file import read_measured_on
from megatron_moe.experts.from_source import divides_source
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.reader import SourceCheckpoint, open_mixed
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.overlap import without_tp_overlap
from megatron_moe.model.receipt import (
    checksums_of_sources,
    gather_receipt,
    rank_receipt,
    write_receipt,
)
from megatron_moe.model.routers import set_output_scales
from megatron_moe.model.upcycle import check_coverage, upcycle
from megatron_moe.model.verify import Agreement, compare_with_dense, verify_length
from megatron_moe.runtime.memory import held_bytes, peak_bytes, reset_peak
from megatron_moe.source.open import DistributedSource

VERIFY_UP_TO_PARAMETERS = 1_000_000_000


def upcycled_model(job: Job, dense: SourceCheckpoint, plan: ExpertPlan, texts: Texts) -> Model:
    """Build the model, fill it from the dense checkpoint, verify it, and write the receipt."""
    config, rank = job.config, job.world.rank
    distributed = isinstance(dense, DistributedSource)
    if distributed and config.upcycle.verify == "always":
        raise ConfigError(
            f"upcycle.verify (always) needs a Hugging Face folder, but source.path "
            f"({dense.folder}) is a distributed checkpoint, whose logits transformers cannot "
            "compute.\n  set upcycle.verify=auto: layers and losses are compared all the same"
        )
    reset_peak()
    held, start = held_bytes(), time.perf_counter()
    model = empty_model(job, dense.spec, plan)
    mix_with = open_mixed(dense, config.upcycle.mix_with)
    filled = upcycle(model, dense, plan, layout=job.layout, rank=rank, mix_with=mix_with)
    mine = rank_receipt(
        filled,
        held_bytes_before=held,
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - start,
    )
    tensors_used = check_coverage(filled, dense, plan)
    agreement, against_dense = None, None
    if _wants_verification(config, dense):
        with without_tp_overlap(model.modules):  # its buffers are for training's micro-batches
            if distributed:
                job.say("Logits not compared: transformers cannot load a distributed checkpoint")
            else:
                agreement = _verify(job, model, texts)
            if divides_source(config, dense.spec):
                against_dense = _compare(job, model, dense, texts)
            else:
                job.say("Layers not compared: ep does not divide the experts of the source")
    receipt = gather_receipt(
        mine,
        tensors_used=tensors_used,
        source_bytes=dense.source_bytes,
        plan_hash=plan.hash,
        method=plan.recipe.method,
        frozen=config.frozen_after(0),
        lora=config.lora,
        agreement=agreement,
        against_dense=None if against_dense is None else against_dense.to_json(),
        source_files=checksums_of_sources([dense, *mix_with]),
        construction=None if config.upcycle.plan is None else read_measured_on(config.upcycle.plan),
    )
    if rank == 0:
        write_receipt(receipt, config.run.dir)
    job.say(
        f"Built from {tensors_used} tensors of the source in {receipt['seconds']:.1f} s; "
        f"rank 0 read {mine.bytes_read / 2**20:.1f} MiB for its "
        f"{mine.parameter_bytes / 2**20:.1f} MiB shard"
    )
    return model


def empty_model(job: Job, spec: ModelSpec, plan: ExpertPlan) -> Model:
    """Build this rank's part of the MoE without values, with the plan's scales in its routers."""
    model = build_model(
        job.config,
        spec,
        layout=job.layout,
        groups=job.groups,
        rank=job.world.rank,
        engine=job.engine,
    )
    set_output_scales(model.modules, plan)
    return model


def _wants_verification(config: RunConfig, dense: SourceCheckpoint) -> bool:
    if config.upcycle.verify == "auto":
        parameters = sum(math.prod(tensor.shape) for tensor in dense.tensors.values())
        return parameters <= VERIFY_UP_TO_PARAMETERS
    return config.upcycle.verify == "always"


def _verify(job: Job, model: Model, texts: Texts) -> Agreement:
    config = job.config
    length = verify_length(config.data.seq_length, tp=job.groups.tp.size(), cp=job.groups.cp.size())
    tokens_S = torch.from_numpy(texts.first_sample().ids_T[:length].copy())
    agreement = compare_with_dense(model, config.source.path, tokens_S, groups=job.groups)
    job.say(
        f"Compared with the source model on {agreement.tokens} tokens: max logit error "
        f"{agreement.max_logit_error:.2e}, same next token at {agreement.argmax_agreement:.1%}"
    )
    return agreement


def _compare(job: Job, model: Model, dense: SourceCheckpoint, texts: Texts) -> AgainstDense:
    train = job.config.train.model_copy(update={"tp_comm_overlap": False})
    config = job.config.model_copy(update={"train": train})
    comparison = ComparisonJob(
        config=config, dense=dense, layout=job.layout, groups=job.groups,
        rank=job.world.rank, engine=job.engine,
    )  # fmt: skip
    result = compare_layers_and_losses(comparison, model, texts)
    job.say(str(result))
    return result
