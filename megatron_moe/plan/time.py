"""Seconds of one optimizer step, tokens a second and MFU of a layout.

    step = m * slowest stage                          m micro-batches of one replica
         + (pp - 1) / vpp * slowest stage             pipeline fill and drain, interleaved
         + p2p + exposed gradient reduction and parameter gather + optimizer

The slowest stage is usually the last: it holds the output layer and the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.plan.flops import forward_flops, training_flops
from megatron_moe.plan.kernels import HBM_EFFICIENCY, Kernels, Seconds
from megatron_moe.plan.layer import EXPOSED, Machine, Parts, layer_seconds, total
from megatron_moe.plan.network import groups_of
from megatron_moe.plan.parameters import rank_parameters
from megatron_moe.plan.shape import MoeShape
from megatron_moe.plan.workload import Degrees, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Prediction for one optimizer step."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    """Percent of the GPU's dense bf16 peak, with full attention and without padding counted."""
    parts: dict[str, float]
    """Seconds of the step by what they are spent on; they sum to `step_seconds`."""

    @property
    def limit(self) -> str:
        """The largest part besides the products that the model needs."""
        return max(
            (p for p in self.parts if p not in ("gemm", "attention")), key=self.parts.__getitem__
        )


def step_time(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> StepTime:
    """Predict one step; the layout must be legal for the batch."""
    batches = work.micro_batches(degrees)
    middle, last = _stage(shape, work, degrees, machine)
    parts = {name: batches * seconds.both for name, seconds in middle.items()}
    one, slowest = _sum(middle), _sum(last)
    parts["last_stage"] = batches * (slowest - one)
    parts["bubble"] = (degrees.pp - 1) / degrees.vpp * slowest
    parts["pp"] = batches * _send(shape, work, degrees, machine)
    parts["dp"], parts["optimizer"] = _update(shape, work, degrees, machine)
    seconds = sum(parts.values())
    flops = training_flops(
        forward_flops(
            shape, sequence_length=work.sequence_length, batch_size=work.global_batch_size
        ).model
    )
    tokens = work.sequence_length * work.global_batch_size
    return StepTime(
        step_seconds=seconds,
        tokens_per_second_per_gpu=tokens / seconds / degrees.gpus,
        mfu=100 * flops / (seconds * degrees.gpus * machine.gpu.peak_flops),
        parts=parts,
    )


def _sum(parts: Parts) -> float:
    return sum(seconds.both for seconds in parts.values())


def _stage(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> tuple[Parts, Parts]:
    """Time of one micro-batch in a stage's layers, and in the last stage with the output layer."""
    # A layer takes as long whatever pp and dp are: a search meets few different layers.
    ranks = degrees.tp * degrees.cp * degrees.ep * degrees.etp
    one_stage = replace(degrees, gpus=ranks, pp=1, vpp=1)
    kinds = ((True, shape.num_moe_layers), (False, shape.num_dense_layers))
    layers = total(
        [
            {
                name: _scale(seconds, count / degrees.pp)
                for name, seconds in layer_seconds(
                    shape, work, one_stage, machine, routes=routes
                ).items()
            }
            for routes, count in kinds
            if count
        ]
    )
    return layers, total([layers, {"last_stage": _output_layer(shape, work, degrees, machine)}])


def _scale(seconds: Seconds, times: float) -> Seconds:
    return Seconds(seconds.forward * times, seconds.backward * times)


def _output_layer(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> Seconds:
    """Product with the vocabulary and the cross entropy, which passes over fp32 logits."""
    kernels = Kernels(machine.gpu, machine.calibration, work.bytes_per_value)
    columns = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp
    tokens = work.sequence_length * work.micro_batch_size / degrees.cp
    loss = kernels.elementwise(tokens * columns, forward=4, backward=2)
    return kernels.linear(tokens, shape.hidden_size, columns) + loss


def _send(shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine) -> float:
    """Seconds a micro-batch waits for activations and gradients from neighbouring stages."""
    tokens = work.sequence_length * work.micro_batch_size / (degrees.cp * degrees.tp)
    once = machine.links.send(
        groups_of(degrees)["pp"], tokens * shape.hidden_size * work.bytes_per_value
    )
    return 2 * degrees.vpp * once * (EXPOSED if degrees.vpp > 1 else 1.0)


def _update(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> tuple[float, float]:
    """Exposed seconds of gradient reduction and parameter gather, and of the optimizer."""
    groups = groups_of(degrees)
    dense, experts = _stage_parameters(shape, degrees)
    links, value = machine.links, work.bytes_per_value
    communicate = sum(
        links.gather(group, params * 4) + links.gather(group, params * value)
        for group, params in ((groups["dp_cp"], dense), (groups["edp"], experts))
    )
    # Gradients: zeroed, read for the norm. On the shard: gradient, master weight and two moments
    # read, three of them and the bf16 weight written.
    shard = dense / groups["dp_cp"].size + experts / groups["edp"].size
    moved = 8 * (dense + experts) + 30 * shard
    return EXPOSED * communicate, moved / (machine.gpu.hbm_bytes_per_second * HBM_EFFICIENCY)


@lru_cache(maxsize=4096)
def _stage_parameters(shape: MoeShape, degrees: Degrees) -> tuple[int, int]:
    return rank_parameters(shape, degrees, pp_rank=0)
