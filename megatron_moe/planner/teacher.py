"""Time, memory and FLOPs that a teacher adds to a step (`train/teacher.py`).

Nothing here was measured on a GPU. The teacher only runs forward, and keeps nothing but the last
hidden states of a step.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.planner.activations import chunks_in_flight, local_tokens
from megatron_moe.planner.flops import SequenceFlops, forward_flops
from megatron_moe.planner.parameters import rank_parameters
from megatron_moe.planner.shape import MoeShape, source_shape
from megatron_moe.planner.workload import Degrees, TeacherWork, Workload


def teacher_work(config: RunConfig, spec: ModelSpec) -> TeacherWork | None:
    """Return what the teacher of a run computes in its first step; None without a teacher.

    Args:
        config: The run.
        spec: Shape of the run's source.

    Raises:
        CheckpointError: ``teacher.path`` has no config.json that can be used.
    """
    settings = config.teacher
    if not settings.teaches:
        return None
    shape = source_shape(spec if settings.path is None else read_spec(settings.path))
    return TeacherWork(
        shape=shape,
        logits=bool(settings.logits_weight),
        layers=bool(settings.layers_weight),
        router=bool(settings.router_weight),
    )


def with_teacher(work: Workload, config: RunConfig, spec: ModelSpec) -> Workload:
    """Return the work of a step including that of the teacher."""
    return replace(work, teacher=teacher_work(config, spec))


def teacher_flops(work: TeacherWork, student: MoeShape, sequence_length: int) -> SequenceFlops:
    """Count the teacher's operations on one sequence, in both conventions.

    Its FFNs run again where they are compared with MoE layers, on other inputs than its own; the
    experts' shares take one product more.
    """
    matrices = (3 if work.layers or work.router else 0) + work.router
    ffns = 2 * matrices * student.hidden_size * student.ffn_hidden_size
    own = student.num_moe_layers * sequence_length * ffns
    if not work.logits:
        return SequenceFlops(own, own)
    causal, full = (
        forward_flops(work.shape, sequence_length=sequence_length, causal=causal).model
        for causal in (True, False)
    )
    return SequenceFlops(causal + own, full + own)


def teacher_bytes(shape: MoeShape, work: Workload, degrees: Degrees, *, pp_rank: int) -> float:
    """Return the bytes that the teacher takes on a rank of stage ``pp_rank``.

    These are its weights, the hidden states of all micro-batches and the logits of one on the last
    stage, and the gradients that wait for the backward pass of each MoE layer.
    """
    teacher = work.teacher
    if teacher is None:
        return 0.0
    tokens, value = local_tokens(shape, work, degrees), work.bytes_per_value
    values = float(sum(rank_parameters(teacher.shape, degrees, pp_rank=pp_rank)))
    batches = work.micro_batches(degrees)
    if teacher.logits and pp_rank == degrees.pp - 1:
        columns = padded_vocabulary(teacher.shape.vocab_size, degrees.tp) // degrees.tp
        values += tokens.gathered * columns
        values += batches * tokens.sequence_parallel * teacher.shape.hidden_size
    if teacher.layers and work.recompute != "full":
        chunks = chunks_in_flight(micro_batches=batches, degrees=degrees, pp_rank=pp_rank)
        layers = shape.num_moe_layers * degrees.stage_shares(shape.num_layers)[pp_rank]
        kept = tokens.sequence_parallel * shape.hidden_size
        values += chunks / degrees.vpp * layers * kept
    return values * value
