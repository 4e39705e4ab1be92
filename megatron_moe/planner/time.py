"""Predict the seconds of one optimizer step, tokens per second and MFU of a layout.

    step = m * slowest stage                          m micro-batches of one replica
         + (pp - 1) / vpp * slowest stage             pipeline fill and drain, interleaved
         + p2p + exposed gradient reduction and parameter gather + optimizer
         + forward pass of a teacher
         + all of these but the update / guard.device_check_interval

The last stage is the slowest, because it holds the output layer and the loss; the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_moe.config.parts import Frozen
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.planner.activations import paired_share
from megatron_moe.planner.flops import sequence_flops
from megatron_moe.planner.kernels import HBM_EFFICIENCY, Kernels, Seconds
from megatron_moe.planner.layer import EXPOSED, Machine, ffn_seconds, layer_seconds
from megatron_moe.planner.network import group_of
from megatron_moe.planner.orthogonalization import orthogonalization_flops
from megatron_moe.planner.parameters import trained_parameters
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.teacher import teacher_flops
from megatron_moe.planner.workload import Degrees, TeacherWork, Workload

HOST_BYTES_PER_SECOND = 25e9
"""Bandwidth between host memory and a GPU in one direction: 16 lanes of PCIe 4, less overhead. An
assumption, for all GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Prediction for one optimizer step."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    """Percent of the GPU's dense bf16 peak. Counts the attention that a causal model needs, and no
    padding."""
    mfu_full_attention: float
    """Percent of the peak with the whole square of the attention scores, as some papers count."""
    parts: dict[str, float]
    """Seconds of the step by part; they sum to `step_seconds`."""

    @property
    def limit(self) -> str:
        """Name of the largest part other than the model's matrix products and attention."""
        return max(
            (p for p in self.parts if p not in ("gemm", "attention")), key=self.parts.__getitem__
        )


def step_time(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> StepTime:
    """Predict the time of one step; the layout must be legal for the batch."""
    batches = work.micro_batches(degrees)
    layers, output = _model(shape, work, degrees, machine)
    share = max(degrees.stage_shares(shape.num_layers))
    slowest = sum(layers.values()) * share + output
    parts = {name: batches * seconds * share for name, seconds in layers.items()}
    if work.expert_overlap and "ep" in parts:
        pairs = paired_share(micro_batches=batches, degrees=degrees)
        parts["ep"] *= 1 - (1 - EXPOSED) * pairs
    parts["output_layer"] = batches * output
    parts["bubble"] = (degrees.pp - 1) / degrees.vpp * slowest
    parts["pp"] = batches * _send(shape, work, degrees, machine)
    parts["dp"], parts["optimizer"] = _update(shape, work, degrees, machine)
    flops = sequence_flops(shape, work.sequence_length, work.frozen)
    if work.teacher is not None:
        parts["teacher"] = _teach(work.teacher, shape, work, degrees, machine)
        flops += teacher_flops(work.teacher, shape, work.sequence_length)
    if work.device_check_interval is not None:
        passes = sum(s for part, s in parts.items() if part not in ("dp", "optimizer"))
        parts["device_check"] = passes / work.device_check_interval
    seconds = sum(parts.values())
    percent = 100 * work.global_batch_size / (seconds * degrees.gpus * machine.gpu.peak_flops)
    tokens = work.sequence_length * work.global_batch_size
    return StepTime(
        step_seconds=seconds,
        tokens_per_second_per_gpu=tokens / seconds / degrees.gpus,
        mfu=percent * flops.causal,
        mfu_full_attention=percent * flops.full_attention,
        parts=parts,
    )


def _teach(
    teacher: TeacherWork, shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> float:
    """Return the seconds of a step's teaching: a forward pass of the teacher, and its FFNs."""
    batches = work.micro_batches(degrees)
    seconds = 0.0
    if teacher.logits:
        alone = replace(work, teacher=None, recompute="none")
        layers, output = _forward(teacher.shape, alone, degrees, machine)
        share = max(degrees.stage_shares(teacher.shape.num_layers))
        slowest = layers * share + output
        seconds += (batches + (degrees.pp - 1) / degrees.vpp) * slowest
    if teacher.layers or teacher.router:
        share = max(degrees.stage_shares(shape.num_layers))
        ffn = ffn_seconds(shape.ffn_hidden_size, shape, work, degrees, machine)
        products = (3 + teacher.router) / 3  # the shares take one product more than the FFN
        seconds += batches * share * shape.num_moe_layers * ffn.forward * products
    return seconds


def _forward(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> tuple[float, float]:
    """Return the seconds of one micro-batch's forward pass: of all layers, and of the output."""
    layers = 0.0
    for routes, count in ((True, shape.num_moe_layers), (False, shape.num_dense_layers)):
        if count:
            parts = layer_seconds(shape, work, degrees, machine, routes=routes)
            layers += count * sum(part.forward for part in parts.values())
    return layers, _output_layer(shape, work, degrees, machine).forward


def least_seconds(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> float:
    """Return a lower bound on the step time of layouts with this tp, cp, ep, etp and micro-batch.

    It assumes one stage, so that no rank waits, no gradient reduction, no optimizer, counts the
    output layer once, and overlaps all exchanges that overlap in part.
    """
    batches = work.global_batch_size * degrees.tp * degrees.cp / degrees.gpus
    layers, output = _model(shape, work, degrees, machine)
    hidden = (1 - EXPOSED) * work.expert_overlap * layers.get("ep", 0.0)
    return batches / work.micro_batch_size * (sum(layers.values()) - hidden + output)


def _model(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> tuple[dict[str, float], float]:
    """Return the seconds of one micro-batch: of all layers by part, and of the output layer."""
    # pp and dp do not change these times, so a search needs only few different ones.
    tp, cp, ep, etp = degrees.tp, degrees.cp, degrees.ep, degrees.etp
    alone = Degrees(gpus=tp * cp * ep * etp, tp=tp, cp=cp, ep=ep, etp=etp)
    return _one_stage(shape, work, alone, machine)


@lru_cache(maxsize=16384)
def _one_stage(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> tuple[dict[str, float], float]:
    layers: dict[str, float] = {}
    for routes, count in ((True, shape.num_moe_layers), (False, shape.num_dense_layers)):
        if not count:
            continue
        for name, part in layer_seconds(shape, work, degrees, machine, routes=routes).items():
            layers[name] = layers.get(name, 0.0) + count * part.both
    return layers, _output_layer(shape, work, degrees, machine).both


def _output_layer(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> Seconds:
    """Return the time of the output product and of a fused cross entropy (6 passes over bf16)."""
    kernels = Kernels(machine.gpu, machine.calibration, work.bytes_per_value)
    columns = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp
    tokens = work.sequence_length * work.micro_batch_size / degrees.cp
    loss = kernels.elementwise(tokens * columns, forward=4, backward=2)
    trained = float("embeddings" not in work.frozen)
    return kernels.linear(tokens, shape.hidden_size, columns, trained=trained) + loss


def _send(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> float:
    """Return the seconds a micro-batch waits for activations and gradients of adjacent stages."""
    tokens = work.sequence_length * work.micro_batch_size / (degrees.cp * degrees.tp)
    once = machine.links.send(
        group_of("pp", degrees), tokens * shape.hidden_size * work.bytes_per_value
    )
    return 2 * degrees.vpp * once * (EXPOSED if degrees.vpp > 1 else 1.0)


def _update(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> tuple[float, float]:
    """Return the exposed seconds of gradient reduction and weight gather, and the optimizer's."""
    replicas, expert_replicas = group_of("dp_cp", degrees), group_of("edp", degrees)
    dense, experts = _stage_parameters(shape, degrees, work.frozen)
    links, value = machine.links, work.bytes_per_value
    # Muon reduces whole gradients: an all-reduce is a reduce-scatter and an all-gather.
    gradient_bytes = work.state.gradient * (2 if work.optimizer == "muon" else 1)
    communicate = sum(
        links.gather(group, params * gradient_bytes) + links.gather(group, params * value)
        for group, params in ((replicas, dense), (expert_replicas, experts))
    )
    # All gradients are zeroed, and read for the norm. On the shard, the gradient, the master weight
    # and two moments are read; the master weight, the moments and the bf16 weight are written.
    # Moments in host memory cross the bus both ways, one after the other.
    shard = dense / replicas.size + experts / expert_replicas.size
    moved = 2 * work.state.gradient * (dense + experts) + (14 + 2 * work.state.moments) * shard
    seconds = moved / (machine.gpu.hbm_bytes_per_second * HBM_EFFICIENCY)
    seconds += 2 * work.state.host * shard / HOST_BYTES_PER_SECOND
    if work.optimizer == "muon":
        flops = orthogonalization_flops(shape, degrees, work.frozen)
        seconds += flops / (machine.gpu.peak_flops * machine.calibration.gemm_efficiency)
    return EXPOSED * communicate, seconds


@lru_cache(maxsize=4096)
def _stage_parameters(shape: MoeShape, degrees: Degrees, frozen: Frozen) -> tuple[int, int]:
    return trained_parameters(shape, degrees, pp_rank=0, frozen=frozen)
