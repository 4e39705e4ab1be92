"""Predict the memory of a rank by part.

Weights, gradients and optimizer state are exact; the rest is estimated. Temporary buffers follow
Megatron-Core's allocations; the constants below are margins.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from megatron_moe.config.parts import ALL_TRAINED, Frozen, Role
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.parallel.stages import EVEN
from megatron_moe.planner.activations import local_tokens, recomputed_layer, stage_activations
from megatron_moe.planner.buffers import BufferLayout, distributed_layout
from megatron_moe.planner.parameters import (
    LocalTensor,
    rank_parameters,
    rank_tensors,
    trained_parameters,
)
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.teacher import teacher_bytes
from megatron_moe.planner.workload import Degrees, StatePrecision, Workload

GIB = 2**30

SHARED_EMBEDDING = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors on the first and on the last stage that hold the same weights if they are tied."""

FRAMEWORK_GIB = 2.5
"""CUDA context, cuBLAS workspaces, loaded kernels."""

COMMUNICATOR_GIB = 0.15
"""NCCL's buffers of one communicator with more than one member (16 channels of 4 MiB, plus
buffers of the protocols)."""

FRAGMENTATION = 0.05
"""Extra memory for fragmentation, as a fraction of the memory allocated and freed in a step."""


ADAM_ROLES: frozenset[Role] = frozenset({"norms", "embeddings"})
"""Roles that Muon leaves to AdamW, besides biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Bytes that stay allocated for the whole run."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0
    """Bytes of moments in host memory; they are not on the GPU."""

    def to_json(self) -> dict[str, int]:
        """Return the parts; host memory only if there is any."""
        return {name: size for name, size in asdict(self).items() if size or name != "host"}


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
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, float]:
        """Return the parts and the total for ``--json``; the teacher only if there is one."""
        parts = {name: gib for name, gib in asdict(self).items() if gib or name != "teacher"}
        return parts | {"total": self.total}


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
    frozen: Frozen = ALL_TRAINED,
) -> ModelState:
    """Return the exact bytes of weights, gradients and optimizer state of one rank.

    Args:
        shape: The model.
        degrees: The layout.
        pp_rank: Pipeline coordinate of the rank.
        weight_bytes: 2 for bf16, 4 for fp32; an fp32 run keeps no master copy.
        precision: Bytes of gradients, master weights and moments; None takes the defaults.
        distributed_optimizer: Whether weights and gradients are in padded buffers, and the
            optimizer state is sharded over the replicas.
        bucket_size: Elements of a gradient bucket of the first stage's first chunk; None makes one
            bucket.
        replica: Index of the rank among the dp * cp replicas of the dense parameters.
        expert_replica: Index of the rank among the edp replicas of its experts.
        frozen: Parts that have no gradients and no optimizer state.
    """
    precision = precision or StatePrecision()
    state_bytes = precision.moments + (precision.master if weight_bytes < 4 else 0)
    buffered = owned = unbuffered = 0
    for chunk_id, tensors in enumerate(rank_tensors(shape, degrees, pp_rank=pp_rank)):
        chunk = [tensor for tensor in tensors if not frozen.covers(tensor.part)]
        unbuffered += sum(tensor.numel for tensor in tensors if frozen.covers(tensor.part))
        for expert, replicas, index in (
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
            owned += layout.owned(index, replicas=replicas)
    return ModelState(
        weights=(buffered + unbuffered) * weight_bytes,
        gradients=buffered * precision.gradient,
        optimizer=owned * state_bytes,
        host=owned * precision.host,
    )


def buffer_elements(
    shape: MoeShape, degrees: Degrees, *, pp_rank: int, frozen: Frozen = ALL_TRAINED
) -> tuple[int, int]:
    """Return the elements of a rank's buffers of dense and of expert parameters, with padding.

    Frozen parameters are in no buffer.

    Each buffer is assumed to have one bucket, as in models with fewer than 40 M parameters a rank;
    more buckets add a little padding.
    """
    elements = {False: 0, True: 0}
    for tensors in rank_tensors(shape, degrees, pp_rank=pp_rank):
        chunk = [tensor for tensor in tensors if not frozen.covers(tensor.part)]
        for expert, replicas in ((False, degrees.dp * degrees.cp), (True, degrees.edp)):
            tensors = _of_one_buffer(chunk, degrees, expert=expert)
            elements[expert] += _layout(shape, degrees, tensors, replicas=replicas).elements
    return elements[False], elements[True]


def _of_one_buffer(
    chunk: list[LocalTensor], degrees: Degrees, *, expert: bool
) -> list[LocalTensor]:
    """Return the tensors of the dense or of the expert buffer, if experts have one."""
    separate = has_own_replicas(degrees)
    return [tensor for tensor in chunk if (tensor.expert and separate) is expert]


def has_own_replicas(degrees: Degrees) -> bool:
    """Return whether Megatron-Core treats replicas of experts as other than those of attention."""
    return degrees.ep > 1 or degrees.etp != degrees.tp


def _layout(
    shape: MoeShape,
    degrees: Degrees,
    tensors: list[LocalTensor],
    *,
    replicas: int,
    bucket_size: int | None = None,
) -> BufferLayout:
    """Lay tensors out in a buffer; a tied embedding of two stages is reduced separately."""
    shared = SHARED_EMBEDDING if shape.tied_embeddings and degrees.pp > 1 else ()
    return distributed_layout(
        [tensor.numel for tensor in tensors],
        replicas=replicas,
        bucket_size=bucket_size,
        alone=frozenset(i for i, tensor in enumerate(tensors) if tensor.name in shared),
    )


def estimated_state(
    shape: MoeShape, work: Workload, degrees: Degrees, *, pp_rank: int
) -> ModelState:
    """Estimate `model_state` in closed form: optimizer state sharded evenly, without padding."""
    frozen, precision, weight_bytes = work.frozen, work.state, work.bytes_per_value
    held = dense, experts = rank_parameters(shape, degrees, pp_rank=pp_rank)
    if frozen:
        dense, experts = trained_parameters(shape, degrees, pp_rank=pp_rank, frozen=frozen)
    shard = -(-dense // (degrees.dp * degrees.cp)) - (-experts // degrees.edp)
    saved = 0
    if work.optimizer == "muon":  # one moment less per element of a matrix
        matrices = trained_parameters(
            shape, degrees, pp_rank=pp_rank, frozen=frozen.with_roles(ADAM_ROLES)
        )
        saved = -(-matrices[0] // (degrees.dp * degrees.cp)) - (-matrices[1] // degrees.edp)
    return ModelState(
        weights=sum(held) * weight_bytes,
        gradients=(dense + experts) * precision.gradient,
        optimizer=shard * (precision.moments + (precision.master if weight_bytes < 4 else 0))
        - saved * (precision.moments - precision.momentum),
        host=shard * precision.host,
    )


def rank_memory(
    shape: MoeShape,
    work: Workload,
    degrees: Degrees,
    *,
    pp_rank: int,
    state: ModelState | None = None,
) -> RankMemory:
    """Predict the GiB of a rank of stage ``pp_rank`` at the peak of a step.

    Args:
        shape: The model.
        work: The batch.
        degrees: The layout.
        pp_rank: Pipeline coordinate of the rank.
        state: Result of `model_state`; None computes `estimated_state`, which is fast.
    """
    state = state or estimated_state(shape, work, degrees, pp_rank=pp_rank)
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
        teacher=teacher_bytes(shape, work, degrees, pp_rank=pp_rank) / GIB,
    )


def peak_memory(shape: MoeShape, work: Workload, degrees: Degrees) -> RankMemory:
    """Return the memory of the rank that needs most, in closed form.

    That rank is in the first stage, which has the most micro-batches in flight, in the last, which
    has the logits, or in the second, if the first has fewer layers. With a manual layout, it may be
    any.
    """
    stages = {0, degrees.pp - 1} | ({min(1, degrees.pp - 1)} if degrees.split != EVEN else set())
    if degrees.split.layout is not None:
        stages = set(range(degrees.pp))
    memories = (rank_memory(shape, work, degrees, pp_rank=stage) for stage in sorted(stages))
    return max(memories, key=lambda memory: memory.total)


def _dispatcher(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Return the bytes of one layer's temporary rows, from dispatch to the gather over etp.

    They are permuted for sending, received, sorted by expert and gathered over etp. The busiest
    rank receives more than it sends; a capacity factor bounds both.
    """
    if not shape.moe_layers:
        return 0.0
    rows = local_tokens(shape, work, degrees).expert_rows
    return (2 * rows / degrees.etp + rows) * shape.hidden_size * work.bytes_per_value


def _expert_gradients(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Return the bytes of a layer's gate and up gradients before accumulation in the fp32 buffer.

    The torch engine computes those of all local experts at once; Transformer Engine accumulates in
    place.
    """
    if work.engine != "torch" or not shape.moe_layers or "experts" in work.frozen:
        return 0.0
    neurons = shape.num_moe_experts // degrees.ep * shape.moe_ffn_hidden_size / degrees.etp
    return 2 * neurons * shape.hidden_size * work.bytes_per_value


def _logits(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Return the bytes of a micro-batch's logits, which the backward pass overwrites in place."""
    columns = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp
    tokens = local_tokens(shape, work, degrees).gathered
    return tokens * columns * work.bytes_per_value


def _communication(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    """Return the GiB of NCCL's communicators and of buffers for pipeline sends and tp gathers."""
    d = degrees
    sizes = (d.tp, d.cp, d.dp * d.cp, d.pp, d.ep, d.etp, d.edp)
    tokens = local_tokens(shape, work, degrees)
    sent = 4 * tokens.sequence_parallel * math.ceil((d.pp - 1) / d.pp)
    gathered = tokens.gathered if d.tp > 1 else 0.0
    buffers = (sent + gathered) * shape.hidden_size * work.bytes_per_value
    return COMMUNICATOR_GIB * sum(size > 1 for size in sizes) + buffers / GIB
