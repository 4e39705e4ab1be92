"""Check 10: whole training steps, beside the plan's and transformers' Mixtral's."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from gpu_checks.inputs import ROOT, shape_config
from gpu_checks.session import Session
from gpu_checks.timing import GIB, synchronize
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.runtime.world import World

TIMES_PEER, CAUSAL_MFU, MEMORY_ERROR = 2.0, 0.45, 0.10
MFU_FORMULA = (
    "tokens per second * FLOPs per token / peak; FLOPs: matrix products of forward and backward, "
    "attention causal (half the square), without router, padding, recomputation; peak: the dense "
    "bf16 rate of the data sheet"
)
STEPS, WARMUP = 4, 2


def speed(session: Session) -> None:
    """Time steps with 4 and 8 experts and of the peer; judge them by the prediction and targets."""
    gpu, gib = _card(session)
    for experts in (4, 8):
        layers = _layers_that_fit(session, experts, gpu, gib)
        label, config = f"{experts} experts, {layers} layers", _config(session, experts, layers)
        with _reported(session, label):
            session.on_rank(partial(_time_ours, session, label, config, gpu))
        if experts == 4:
            with _reported(session, "transformers"):
                session.on_rank(partial(_time_peer, session, config))
            with _reported(session, "tokens/s beside transformers"):
                _compare(session, label)


@contextmanager
def _reported(session: Session, what: str) -> Iterator[None]:
    """Turn an error into a result: the next measurement may work."""
    try:
        yield
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        problem = f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
        session.add(what, problem, verdict="FAIL", error=str(error)[-2000:])


def _config(session: Session, experts: int, layers: int) -> RunConfig:
    return shape_config(
        session, f"speed-{experts}-{layers}", shape={"layers": layers},
        moe={"num_moe_experts": experts},
    )  # fmt: skip


def _card(session: Session) -> tuple[str, float]:
    """Return the GPU's name in the planner's table, and its GiB."""
    from megatron_moe.planner.hardware import GPUS

    machine = json.loads((session.folder / "machine.json").read_text())
    known = [name for name in GPUS if name in machine["device"].lower()]
    return (known[0] if known else "h100"), machine["memory_gib"]


def _layers_that_fit(session: Session, experts: int, gpu: str, gib: float) -> int:
    """Return 16 layers, or as many as the planner says fit into the card's memory."""
    from megatron_moe.planner.hardware import HEADROOM

    layers = session.size(16, 2)
    room = gib * (1 - HEADROOM)
    while layers > 4 and _plan(_config(session, experts, layers), gpu).memory.total > room:
        layers -= 4
    return layers


def _plan(config: RunConfig, gpu: str) -> Any:
    """Return the planner's prediction for one GPU."""
    from megatron_moe.planner.calibration import FITTED
    from megatron_moe.planner.check import predict_candidate
    from megatron_moe.planner.hardware import gpu_named
    from megatron_moe.planner.layer import Machine
    from megatron_moe.planner.shape import upcycled_shape
    from megatron_moe.planner.workload import degrees_of, workload_of

    shape = upcycled_shape(read_spec(config.source.path), config.moe)
    machine = Machine(gpu_named(gpu), FITTED)
    return predict_candidate(shape, workload_of(config), degrees_of(config, gpus=1), machine)


def _time_ours(session: Session, label: str, config: RunConfig, gpu: str, world: World) -> None:
    """Time steps by `megatron_moe.bench`, first with natural routing and then with balanced."""
    from megatron_moe.bench.build import force_balance
    from megatron_moe.bench.steps import Bench, BenchOptions

    bench = Bench(config, world, BenchOptions(random=True))
    plan, highest = _plan(config, gpu), 0.0
    for routing in ("natural", "balanced"):
        if routing == "balanced":
            force_balance(bench.state.model)
        for _ in range(WARMUP):
            bench.timed_step()
        steps = [bench.timed_step() for _ in range(STEPS)]
        tokens = statistics.median(step["throughput/tokens_per_second_per_gpu"] for step in steps)
        highest = max(highest, *(step["memory/peak_gib"] for step in steps))
        mfu, flops, peak = _causal_mfu(config, gpu, tokens)
        predicted = plan.time.tokens_per_second_per_gpu
        session.add(
            f"MFU, {label}, {routing}",
            f"{mfu:.1%}, {tokens:.0f} tokens/s (plan {predicted:.0f})",
            expected=f">= {CAUSAL_MFU:.0%}", verdict=session.target(mfu >= CAUSAL_MFU), figure=True,
            causal_mfu=mfu, tokens_per_second=tokens, flops_per_token=flops, peak_flops=peak,
            formula=MFU_FORMULA, peak_is_of=f"{gpu}, data sheet, dense bf16", steps=steps,
            plan=plan.to_json(), config=config.model_dump(mode="json"),
        )  # fmt: skip
    _judge_memory(session, label, highest, plan.memory)


def _judge_memory(session: Session, label: str, peak_gib: float, plan: Any) -> None:
    """Compare what torch allocated with the same parts of the prediction."""
    allocated = plan.total - plan.framework - plan.fragmentation
    error = peak_gib / allocated - 1
    session.add(
        f"peak memory, {label}", f"{peak_gib:.1f} GiB, {error:+.0%} of plan's {allocated:.1f}",
        expected=f"within {MEMORY_ERROR:.0%}", figure=True,
        verdict=session.target(abs(error) <= MEMORY_ERROR), peak_gib=peak_gib, error=error,
        plan_gib=plan.to_json(), compared="without the plan's framework and fragmentation",
    )  # fmt: skip


def _causal_mfu(
    config: RunConfig, gpu: str, tokens_per_second: float
) -> tuple[float, float, float]:
    """Return MFU, FLOPs of a token and the peak that it is relative to (`MFU_FORMULA`)."""
    from megatron_moe.planner.flops import forward_flops, training_flops
    from megatron_moe.planner.hardware import gpu_named
    from megatron_moe.planner.shape import upcycled_shape

    shape = upcycled_shape(read_spec(config.source.path), config.moe)
    length = config.data.seq_length
    forward = forward_flops(shape, sequence_length=length, causal=True)
    flops, peak = training_flops(forward.model) / length, gpu_named(gpu).peak_flops
    return tokens_per_second * flops / peak, flops, peak


def _time_peer(session: Session, config: RunConfig, world: World) -> None:
    """Time transformers' MixtralForCausalLM on random weights and tokens of the same shape."""
    step = _peer_step(config, world.device)
    for _ in range(WARMUP):
        step()
    synchronize(world.device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize(world.device)
    batch = config.train.global_batch_size * config.data.seq_length
    tokens = STEPS * batch / (time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / GIB if world.device.type == "cuda" else 0.0
    session.add(
        "transformers", f"{tokens:.0f} tokens/s, {memory:.1f} GiB", tokens_per_second=tokens,
        peak_gib=memory, experts_implementation="grouped_mm", attention="sdpa",
        weights="random, natural routing", balancing_loss="none",
        state="weights, gradients and moments in bf16",
    )  # fmt: skip


def _peer_step(config: RunConfig, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one step: micro-batches of one sequence, then fused AdamW."""
    model = _mixtral(config, read_spec(config.source.path), device)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    length, vocabulary = config.data.seq_length, model.config.vocab_size
    ids_NT = torch.randint(vocabulary, (config.train.global_batch_size, length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for ids_T in ids_NT:
            inputs, labels = ids_T[None, :-1], ids_T[None, 1:]
            loss = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
            (loss / len(ids_NT)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()

    return step


@torch.no_grad()
def _mixtral(config: RunConfig, spec: ModelSpec, device: torch.device) -> Any:
    """Return the peer in bf16 on the device, with random weights."""
    sys.path[:0] = [str(ROOT / "bench")]
    from step_peer import mixtral_config  # bench/step_peer.py
    from transformers import MixtralForCausalLM
    from transformers.initialization import no_init_weights

    moe = config.moe
    with no_init_weights(), torch.device(device):
        model: Any = MixtralForCausalLM(
            mixtral_config(
                spec, experts=moe.num_moe_experts, topk=moe.moe_router_topk,
                seq_length=config.data.seq_length,
            )
        )  # fmt: skip
    model.to(torch.bfloat16)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    return model.train()


def _compare(session: Session, ours: str) -> None:
    """Put our tokens per second beside the peer's, both with natural routing."""
    lines = [json.loads(line) for line in session.results.read_text().splitlines()]
    tokens = {line["what"]: line["numbers"].get("tokens_per_second") for line in lines}
    ratio = tokens[f"MFU, {ours}, natural"] / tokens["transformers"]
    session.add(
        "tokens/s beside transformers", f"{ratio:.2f} times", expected=f">= {TIMES_PEER:.0f} times",
        verdict=session.target(ratio >= TIMES_PEER), figure=True, ratio=ratio,
    )  # fmt: skip
