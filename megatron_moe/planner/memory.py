"""GiB a rank needs, by part. Weights, gradients and optimizer are exact; the rest is estimated.

The parts that come and go follow what Megatron-Core allocates; the constants below are margins.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.planner.activations import local_tokens, recomputed_layer, stage_activations
from megatron_moe.planner.buffers import BufferLayout, distributed_layout
from megatron_moe.planner.parameters import LocalTensor, rank_parameters, rank_tensors
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Workload

GIB = 2**30

SHARED_EMBEDDING = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Held by the first and by the last stage, where they are tied."""

FRAMEWORK_GIB = 2.5
"""CUDA context, cuBLAS workspaces, loaded kernels."""

COMMUNICATOR_GIB = 0.15
"""NCCL's buffers of one communicator with more than one member (16 channels of 4 MiB and
protocols' extras)."""

FRAGMENTATION = 0.05
"""Part of what comes and goes in a step that the allocator cannot use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Bytes that live for the whole run."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePrecision:
    """Bytes per element of what the optimizer keeps; Megatron-Core's defaults."""

    gradient: int = 4
    """The buffer gradients are added up in (``grad_reduce_in_fp32``)."""
    master: int = 4
    """Main parameters; a fp32 run has none of its own."""
    moments: int = 8
    """Both of Adam's; 4 with ``use_precision_aware_optimizer`` and bf16 moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """GiB of one rank at the peak of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    dispatcher: float
    expert_gradients: float
    logits: float
    communication: float
    framework: float
    fragmentation: float

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, float]:
        """Parts and total, for ``--json``."""
        return asdict(self) | {"total": self.total}


def model_state(
    shape: MoeShape,
    degrees: Degrees,
    *,
    pp_rank: int,
    weight_bytes: int = 2,
    precision: StatePrecision | None = None,
    distributed_optimizer: bool = True,
    bucket_size: int | None = None,
    replica: int = 0,
    expert_replica: int = 0,
) -> ModelState:
    """Weights, gradients and optimizer state of one rank, to the byte.

    Args:
        shape: The model.
        degrees: The layout.
        pp_rank: Pipeline coordinate of the rank.
        weight_bytes: 2 for bf16, 4 for fp32; an fp32 run keeps no master copy.
        precision: Bytes of gradients, master weights and moments; None takes the defaults.
        distributed_optimizer: Weights and gradients lie in padded buffers, and the optimizer's
            state is sharded over the replicas.
        bucket_size: Elements of a gradient bucket of the first stage's first chunk; None makes one
            bucket.
        replica: Place of the rank among the dp * cp replicas of the dense parameters.
        expert_replica: Place among the edp replicas of its experts.
    """
    precision = precision or StatePrecision()
    state_bytes = precision.moments + (precision.master if weight_bytes < 4 else 0)
    buffered = owned = 0
    for chunk_id, chunk in enumerate(rank_tensors(shape, degrees, pp_rank=pp_rank)):
        for expert, replicas, place in (
            (False, degrees.dp * degrees.cp, replica),
            (True, degrees.edp, expert_replica),
        ):
            tensors = _of_one_buffer(chunk, degrees, expert=expert)
            if not distributed_optimizer:
                held = sum(tensor.numel for tensor in tensors)
                buffered += held
                owned += held
                continue
            bucket = bucket_size if pp_rank == chunk_id == 0 else None
            layout = _layout(shape, degrees, tensors, replicas=replicas, bucket_size=bucket)
            buffered += layout.elements
            owned += layout.owned(place, replicas=replicas)
    return ModelState(
        weights=buffered * weight_bytes,
        gradients=buffered * precision.gradient,
        optimizer=owned * state_bytes,
    )


def buffer_elements(shape: MoeShape, degrees: Degrees, *, pp_rank: int) -> tuple[int, int]:
    """Elements of a rank's buffers of dense and of expert parameters, padding included.

    One bucket each, as in models below 40 M parameters a rank; more buckets pad a little more.
    """
    found = {False: 0, True: 0}
    for chunk in rank_tensors(shape, degrees, pp_rank=pp_rank):
        for expert, replicas in ((False, degrees.dp * degrees.cp), (True, degrees.edp)):
            tensors = _of_one_buffer(chunk, degrees, expert=expert)
            found[expert] += _layout(shape, degrees, tensors, replicas=replicas).elements
    return found[False], found[True]


def _of_one_buffer(
    chunk: list[LocalTensor], degrees: Degrees, *, expert: bool
) -> list[LocalTensor]:
    """The tensors in the buffer of one kind.

    Experts have a buffer of their own only where their replicas are others than attention's.
    """
    apart = degrees.ep > 1 or degrees.etp != degrees.tp
    return [tensor for tensor in chunk if (tensor.expert and apart) is expert]


def _layout(
    shape: MoeShape,
    degrees: Degrees,
    tensors: list[LocalTensor],
    *,
    replicas: int,
    bucket_size: int | None = None,
) -> BufferLayout:
    """How they lie in it; a tied embedding of two stages is reduced apart from the rest."""
    shared = SHARED_EMBEDDING if shape.tied_embeddings and degrees.pp > 1 else ()
    return distributed_layout(
        [tensor.numel for tensor in tensors],
        replicas=replicas,
        bucket_size=bucket_size,
        alone=frozenset(i for i, tensor in enumerate(tensors) if tensor.name in shared),
    )


def estimated_state(
    shape: MoeShape, degrees: Degrees, *, pp_rank: int, weight_bytes: int = 2
) -> ModelState:
    """`model_state` with the distributed optimizer in closed form, without buffers' padding."""
    dense, experts = rank_parameters(shape, degrees, pp_rank=pp_rank)
    held = dense + experts
    shard = -(-dense // (degrees.dp * degrees.cp)) - (-experts // degrees.edp)
    defaults = StatePrecision()
    return ModelState(
        weights=held * weight_bytes,
        gradients=held * defaults.gradient,
        optimizer=shard * (defaults.moments + (defaults.master if weight_bytes < 4 else 0)),
    )


def rank_memory(
    shape: MoeShape,
    work: Workload,
    degrees: Degrees,
    *,
    pp_rank: int,
    state: ModelState | None = None,
) -> RankMemory:
    """GiB of a rank of stage ``pp_rank`` at the peak of a step.

    Args:
        shape: The model.
        work: The batch.
        degrees: The layout.
        pp_rank: Pipeline coordinate of the rank.
        state: Bytes of `model_state`; None takes `estimated_state`, which is fast.
    """
    state = state or estimated_state(
        shape, degrees, pp_rank=pp_rank, weight_bytes=work.bytes_per_value
    )
    activations = stage_activations(shape, work, degrees, pp_rank=pp_rank)
    activations += recomputed_layer(shape, work, degrees)
    dispatcher = _dispatcher(shape, work, degrees)
    logits = _logits(shape, work, degrees) if pp_rank == degrees.pp - 1 else 0.0
    return RankMemory(
        weights=state.weights / GIB,
        gradients=state.gradients / GIB,
        optimizer=state.optimizer / GIB,
        activations=activations / GIB,
        dispatcher=dispatcher / GIB,
        expert_gradients=_expert_gradients(shape, work, degrees) / GIB,
        logits=logits / GIB,
        communication=_communication(shape, work, degrees),
        framework=FRAMEWORK_GIB,
        fragmentation=FRAGMENTATION * (activations + dispatcher + logits) / GIB,
    )


def peak_memory(shape: MoeShape, work: Workload, degrees: Degrees) -> RankMemory:
    """Memory of the rank that needs most, in closed form.

    That is one of the first stage, which has most micro-batches in flight, or of the last, which
    has the logits.
    """
    first = rank_memory(shape, work, degrees, pp_rank=0)
    if degrees.pp == 1:
        return first
    last = rank_memory(shape, work, degrees, pp_rank=degrees.pp - 1)
    return max(first, last, key=lambda memory: memory.total)


def _dispatcher(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Transient rows of one layer: permuted to send, received, sorted by expert, gathered over etp.

    The busiest rank receives more than it sends; a capacity factor bounds both.
    """
    if not shape.moe_layers:
        return 0.0
    rows = local_tokens(shape, work, degrees).expert_rows
    return (2 * rows / degrees.etp + rows) * shape.hidden_size * work.bytes_per_value


def _expert_gradients(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Bytes of the gradients of a layer's gate and up before they are added to the fp32 buffer.

    The torch engine forms those of all local experts at once; Transformer Engine adds in place.
    """
    if work.engine != "torch" or not shape.moe_layers:
        return 0.0
    neurons = shape.num_moe_experts // degrees.ep * shape.moe_ffn_hidden_size / degrees.etp
    return 2 * neurons * shape.hidden_size * work.bytes_per_value


def _logits(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Bytes of one micro-batch's logits, which the backward pass overwrites with their gradient."""
    columns = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp
    tokens = local_tokens(shape, work, degrees).gathered
    return tokens * columns * work.bytes_per_value


def _communication(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """GiB of NCCL's communicators, and of what pipeline neighbours and tp ranks hand over."""
    d = degrees
    sizes = (d.tp, d.cp, d.dp * d.cp, d.pp, d.ep, d.etp, d.edp)
    tokens = local_tokens(shape, work, degrees)
    handed = 4 * tokens.sequence_parallel * math.ceil((d.pp - 1) / d.pp)
    gathered = tokens.gathered if d.tp > 1 else 0.0
    moving = (handed + gathered) * shape.hidden_size * work.bytes_per_value
    return COMMUNICATOR_GIB * sum(size > 1 for size in sizes) + moving / GIB
