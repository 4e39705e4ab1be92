"""Define every metric of a run: its name, unit and reduction.

========================================  ========================================================
loss/lm                                   nats per token over the global batch
loss/load_balancing                       before its coefficient, mean of MoE layers; 1 is balanced,
                                          0 with cv_squared
loss/router_z                             before its coefficient, mean of MoE layers and tokens
loss/teacher_logits                       divergence from the teacher, nats per token, before its
                                          weight; this and the next two only with a teacher
loss/teacher_layers                       error of MoE layers relative to FFNs, squared
loss/teacher_router                       divergence of routers from the experts' shares, nats
loss/validation                           nats per token over held-out text, mean of domains
loss/validation/DOMAIN                    the same for each domain, if there are several
perplexity/validation                     exp of it; for each domain if there are several
bits_per_byte/validation                  bits per byte of held-out text, if there is a
                                          tokenizer; for each domain if there are several
mixing/weight/DOMAIN                      share of the future samples
mixing/share/DOMAIN                       share of the samples so far
mixing/epochs/DOMAIN                      number of times its text has been read
grad_norm                                 before clipping, over all parameters
skipped                                   1 if the step changed no weights, else 0
learning_rate                             learning rate of this step
router/load_imbalance                     busiest expert's tokens / mean, mean of MoE layers
router/entropy                            nats, of the softmax over all experts, mean of tokens
router/drop_rate                          choices dropped by capacity / all choices
router/*_by_layer                         each of these three, as a list over MoE layers
router/aux_loss_coeff_by_layer            weight of each load-balancing loss, if they adapt
router/revived                            [layer, expert, sibling] of each dead expert that was
                                          re-created after the step; absent if there is none
router/load_by_expert                     an expert's tokens / mean, a list over MoE layers of lists
                                          over experts; about a hundred times per run
throughput/tokens_per_second_per_gpu      tokens of the global batch / seconds / ranks
throughput/tflops_per_gpu                 model FLOPs (planner/flops.py; causal attention, unpadded,
                                          no weight gradients of frozen roles)
throughput/mfu                            the same / the peak that the log states at start
throughput/mfu_full_attention             the same with the whole square of the attention scores
memory/peak_gib                           maximum over ranks; resident memory on CPU
time/step_seconds                         wall time of the step on the slowest rank
time/data_seconds                         of which waiting for data, on the slowest rank
tokens/batch                              tokens of the global batch
tokens/seen                               tokens since the start of the run
========================================  ========================================================
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import BlendState
from megatron_moe.data.held_out import HeldOut
from megatron_moe.hf.disk import naming, write_text
from megatron_moe.planner.flops import SequenceFlops
from megatron_moe.runtime.memory import peak_bytes
from megatron_moe.train.missing_steps import missing_steps, repeated_steps
from megatron_moe.train.sinks import Sink
from megatron_moe.train.step import StepResult

GIB = 2**30
EXPERT_LOAD_RECORDS = 100
"""Approximate number of steps that record the load of every expert, which is a long list."""
Numbers = dict[str, Any]


def step_numbers(
    result: StepResult,
    *,
    step: int,
    tokens: int,
    learning_rate: float,
    seconds: float,
    data_seconds: float,
    flops: SequenceFlops,
    peak_flops: float,
    config: RunConfig,
) -> Numbers:
    """Return one step's line of metrics.jsonl; it is the same on every rank."""
    slowest, waited, most_bytes = _max_over_ranks(seconds, data_seconds, peak_bytes())
    ranks = dist.get_world_size()
    sequences = result.sequences
    step_tokens = sequences * config.data.seq_length
    rate = sequences / slowest / ranks
    imbalance_L = result.chosen_LE.amax(dim=1) / result.chosen_LE.mean(dim=1)
    drop_rate_L = 1 - result.kept_L / result.chosen_LE.sum(dim=1)
    return {
        "step": step,
        "loss/lm": result.lm_loss,
        "loss/load_balancing": result.load_balancing_loss,
        **({"loss/router_z": result.router_z_loss} if config.moe.moe_z_loss_coeff else {}),
        **{f"loss/teacher_{name}": loss for name, loss in result.teacher.items()},
        "grad_norm": result.grad_norm,
        "skipped": float(result.decision != "keep"),
        "learning_rate": learning_rate,
        "router/load_imbalance": float(imbalance_L.mean()),
        "router/entropy": float(result.entropy_L.mean()),
        "router/drop_rate": float(drop_rate_L.mean()),
        "router/load_imbalance_by_layer": _rounded(imbalance_L),
        "router/entropy_by_layer": _rounded(result.entropy_L),
        "router/drop_rate_by_layer": _rounded(drop_rate_L),
        **_coefficients(result),
        **_revived(result),
        **expert_loads(result.chosen_LE, step, steps=config.train.steps),
        "throughput/tokens_per_second_per_gpu": step_tokens / slowest / ranks,
        "throughput/tflops_per_gpu": flops.causal * rate / 1e12,
        "throughput/mfu": flops.causal * rate / peak_flops,
        "throughput/mfu_full_attention": flops.full_attention * rate / peak_flops,
        "memory/peak_gib": most_bytes / GIB,
        "time/step_seconds": slowest,
        "time/data_seconds": waited,
        "tokens/batch": step_tokens,
        "tokens/seen": tokens,
    }


def _coefficients(result: StepResult) -> Numbers:
    """Return the weights of the load-balancing losses, if they adapt."""
    if result.balance is None:
        return {}
    return {"router/aux_loss_coeff_by_layer": list(result.balance.values())}


def _revived(result: StepResult) -> Numbers:
    """Return which experts were re-created from which siblings, if any were."""
    revived = [[each.layer, each.expert, each.sibling] for each in result.revivals]
    return {"router/revived": revived} if revived else {}


def expert_loads(chosen_LE: Tensor, step: int, *, steps: int) -> Numbers:
    """Return each expert's load over the mean, at the first, the last and about a hundred steps.

    Return an empty dict at all other steps: for 32 layers of 128 experts the list takes 25 kB, too
    much for each of 100,000 steps.
    """
    if step not in (1, steps) and step % max(1, steps // EXPERT_LOAD_RECORDS):
        return {}
    load_LE = chosen_LE / chosen_LE.mean(dim=1, keepdim=True)
    return {"router/load_by_expert": [[round(x, 3) for x in load_E] for load_E in load_LE.tolist()]}


def mixture_numbers(blend: BlendState, num_chunks: Mapping[str, int]) -> Numbers:
    """Return the weight and consumption of each domain; empty if there is only one domain."""
    numbers: Numbers = {}
    if len(blend.domains) > 1:
        for name, weight, consumed in zip(
            blend.domains, blend.weights, blend.consumed, strict=True
        ):
            numbers[f"mixing/weight/{name}"] = weight
            numbers[f"mixing/share/{name}"] = consumed / max(blend.position, 1)
            numbers[f"mixing/epochs/{name}"] = consumed / num_chunks[name]
    return numbers


def held_out_numbers(
    losses: Mapping[str, float], sizes: Mapping[str, HeldOut], *, several: bool
) -> Numbers:
    """Return the metrics derived from held-out losses, per domain if there are ``several``."""
    numbers: Numbers = {}
    for domain, loss in losses.items():
        suffix = f"validation/{domain}" if several else "validation"
        figures = sizes[domain].figures(loss)
        numbers |= {f"{name}/{suffix}": figures[name] for name in ("perplexity", "bits_per_byte")}
    return {name: value for name, value in numbers.items() if value is not None}


def _max_over_ranks(*values: float) -> list[float]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    packed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return packed.tolist()


def _rounded(values_L: Tensor) -> list[float]:
    return [round(value, 6) for value in values_L.tolist()]


class MetricsWriter:
    """Append to metrics.jsonl, and write the scalars to the sinks.

    Create it on one rank only. A resumed run drops the lines of steps that it will take again; a
    new run (``resumed_step=0``) drops all lines, because it writes the line of step 0 again too.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink], *, resumed_step: int) -> None:
        self._path, self._sinks = run_dir / "metrics.jsonl", sinks
        self._file, steps = _reopen(self._path, resumed_step)
        self.remark = _remark(steps, resumed_step)
        """Remark for the log on missing or repeated lines; empty if there are none."""
        # The line of step 0 of a new run is written again as well.
        self._restart_sinks(resumed_step or -1)

    def roll_back(self, step: int) -> None:
        """Drop the lines after ``step``, because these steps are taken again."""
        self._file.close()
        self._file, _ = _reopen(self._path, step)
        self._restart_sinks(step)

    def _restart_sinks(self, step: int) -> None:
        for sink in self._sinks:
            sink.restart_after(step)

    def write(self, numbers: Mapping[str, Any]) -> None:
        """Write one line and flush it to the file before returning."""
        with naming(self._path):
            self._file.write(json.dumps(_finite(numbers), allow_nan=False) + "\n")
            self._file.flush()
        step = numbers["step"]
        scalars = {k: v for k, v in numbers.items() if isinstance(v, int | float) and k != "step"}
        for sink in self._sinks:
            sink.write(scalars, step)

    def sync(self, _numbers: Numbers) -> None:
        """Let the lines so far survive a power failure, as the checkpoint does that follows.

        If the disk fails, the save that follows says so and decides how the run continues.
        """
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close metrics.jsonl; `open_sinks` closes the sinks."""
        self._file.close()


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, in lists too, by None (null), because JSON has neither."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in numbers.items()}


def _reopen(path: Path, resumed_step: int) -> tuple[TextIO, list[int]]:
    """Drop the lines after a step; return the file, to append to, and the steps of its lines."""
    kept: list[str] = []
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        kept = [line for line in lines if resumed_step and _step_of(line) <= resumed_step]
        write_text(path, "".join(line + "\n" for line in kept))
    return path.open("a"), [int(_step_of(line)) for line in kept]


def _remark(steps: list[int], resumed_step: int) -> str:
    """Return which steps up to the resumed one have no line, or several."""
    if resumed_step == 0:
        return ""
    if not steps:
        return f"metrics.jsonl begins with step {resumed_step + 1}: it has no line of a step before"
    remarks = []
    if missing := missing_steps(steps, last=resumed_step):
        remarks.append(f"metrics.jsonl lacks lines of steps that the run has taken: {missing}")
    if repeated := repeated_steps(steps):
        remarks.append(
            f"metrics.jsonl has several lines of steps {repeated}; reports show the last ones"
        )
    return "\n".join(remarks)


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity if it is damaged or cut short, so it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
