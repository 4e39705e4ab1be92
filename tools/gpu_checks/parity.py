"""Checks 3 and 4: numbers of the GPU beside transformers', and beside those of a CPU.

In a rehearsal both sides are the CPU, so the comparison is exact and only the code is tested.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch

from gpu_checks.inputs import merged, tiny_config
from gpu_checks.session import Session, passed
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.world import World

Device = Literal["cpu", "cuda"]
LOGIT_ERROR = {"fp32": 1e-4, "bf16": 1.0}
"""Largest difference from transformers' logits, which reach 20 in this model. fp32 without TF32
rounds to 6e-8 of a number; bf16 to 4e-3, in some thirty products one after the other."""
LOSS_ERROR = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative difference of ten losses. Sums in another order move a logit, and a token near a
tie of the router then goes to another expert."""
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "copy": {"upcycle": {"permutation_seed": 3, "noise_std": 0.01}},
    "drop": {"upcycle": {"method": "drop"}},
    "granular": {"moe": {"moe_ffn_hidden_size": 48}, "upcycle": {"method": "granular"}},
    "split_random": {"moe": {"moe_ffn_hidden_size": 24}, "upcycle": {"method": "split_random"}},
    "split_clustered": {
        "moe": {"moe_ffn_hidden_size": 24}, "upcycle": {"method": "split_clustered"},
    },
    "qwen": {"moe": {"moe_ffn_hidden_size": 40}, "upcycle": {"method": "qwen"}},
    "mix": {"upcycle": {"method": "mix"}},
}  # fmt: skip
"""Methods that need no measuring, for the tiny model's 96 neurons a layer."""
CURVES: dict[str, dict[str, Any]] = {
    "aux loss": {},
    "capacity, probs": {"moe_expert_capacity_factor": 0.75},
    "capacity, position": {
        "moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "position",
    },
    "capacity, padded": {
        "moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True,
    },
    "noisy gate": {
        "router_gate": "noisy_mlp", "moe_router_load_balancing_type": "cv_squared",
    },
}  # fmt: skip


def parity(session: Session) -> None:
    """Compare logits with transformers', and the bits of every construction with the CPU's."""
    logits = {
        precision: tiny_config(session, f"parity-{precision}", train={"precision": precision})
        for precision in LOGIT_ERROR
    }
    session.on_rank(partial(_compare_logits, session, logits))
    methods = {name: changes for name, changes in METHODS.items() if _available(session, name)}
    for device in (session.device, "cpu"):  # CUDA first: no CPU stand-ins in its process
        session.on_rank(partial(_write_digests, session, methods, device), device)
    on_device, on_cpu = (_read_digests(session, device) for device in (session.device, "cpu"))
    for name in methods:
        differ = sorted(k for k in on_cpu[name] if on_device[name].get(k) != on_cpu[name][k])
        same = not differ and len(on_device[name]) == len(on_cpu[name])
        session.add(
            f"weights by {name}", "equal" if same else f"{len(differ)} tensors differ",
            expected="the CPU's bits", verdict=passed(same), differ=differ,
        )  # fmt: skip


def _available(session: Session, method: str) -> bool:
    if method == "split_clustered" and find_spec("ortools") is None:
        session.skip("weights by split_clustered", "ortools is not installed")
        return False
    return True


def _compare_logits(session: Session, configs: dict[str, RunConfig], world: World) -> None:
    from megatron_moe.model.verify import compare_with_dense

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for precision, config in configs.items():
        with _upcycled(config, world) as bench:
            tokens_S = torch.randint(0, 257, (128,), generator=torch.Generator().manual_seed(0))
            result = compare_with_dense(
                bench.state.model, config.source.path, tokens_S, groups=bench.groups
            )
        limit = LOGIT_ERROR[precision]
        session.add(
            f"logits, {precision}", f"{result.max_logit_error:.1e}", expected=f"<= {limit:.0e}",
            verdict=passed(result.max_logit_error <= limit),
            max_logit_error=result.max_logit_error, argmax_agreement=result.argmax_agreement,
        )  # fmt: skip


def _write_digests(
    session: Session, methods: dict[str, dict[str, dict[str, Any]]], device: str, world: World
) -> None:
    """Build the experts by every method; write the SHA-256 of every parameter."""
    digests = {}
    for name, changes in methods.items():
        other = {"mix_with": [str(session.folder / "tiny-other")]} if name == "mix" else {}
        more = {"run": {"device": device}, "upcycle": other}
        config = tiny_config(session, f"parity-{name}-{device}", **merged(changes, more))
        with _upcycled(config, world) as bench:
            digests[name] = {
                key: _digest(parameter)
                for key, parameter in bench.state.model.modules[0].named_parameters()
            }
    (session.folder / f"digests-{device}.json").write_text(json.dumps(digests))


@contextmanager
def _upcycled(config: RunConfig, world: World) -> Iterator[Any]:
    """Yield the training state of `megatron_moe.bench`, filled from the dense checkpoint."""
    from megatron_moe.bench.steps import Bench, BenchOptions
    from megatron_moe.parallel.groups import destroy_groups

    try:
        yield Bench(config, world, BenchOptions())
    finally:
        destroy_groups()


def _digest(tensor: torch.Tensor) -> str:
    as_bytes = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(as_bytes).hexdigest()


def _read_digests(session: Session, device: str) -> dict[str, dict[str, str]]:
    return json.loads((session.folder / f"digests-{device}.json").read_text())


def curves(session: Session) -> None:
    """Train ten steps of every router on the GPU and on a CPU, and compare the losses."""
    configs: dict[Device, dict[str, RunConfig]] = {}
    for device in (session.device, "cpu"):  # CUDA first: no CPU stand-ins in its process
        configs[device] = {
            f"{name}, {precision}": tiny_config(
                session, f"curves-{device}-{name}-{precision}".replace(", ", "-").replace(" ", "-"),
                run={"device": device}, moe=moe,
                train={"precision": precision, "steps": session.size(10, 3)},
            )
            for name, moe in CURVES.items()
            for precision in LOSS_ERROR
        }  # fmt: skip
        session.on_rank(partial(_train_all, configs[device]), device)
    for label, on_cpu in configs["cpu"].items():
        _compare_losses(session, label, losses(configs[session.device][label]), losses(on_cpu))


def _train_all(configs: dict[str, RunConfig], world: World) -> None:
    from megatron_moe.commands.train import train
    from megatron_moe.parallel.groups import destroy_groups

    for config in configs.values():
        if (config.run.dir / "metrics.jsonl").exists():  # a rehearsal has trained it
            continue
        train(config, world)
        destroy_groups()


def losses(config: RunConfig) -> list[float]:
    """Return the loss of each step of a run."""
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [line["loss/lm"] for line in map(json.loads, lines) if "loss/lm" in line]


def _compare_losses(
    session: Session, label: str, on_device: list[float], on_cpu: list[float]
) -> None:
    error = max(abs(a - b) / b for a, b in zip(on_device, on_cpu, strict=True))
    limit = LOSS_ERROR[label.rpartition(", ")[2]]
    session.add(
        label, f"{error:.1e}", expected=f"<= {limit:.0e} relative", verdict=passed(error <= limit),
        relative_error=error, losses=on_device, losses_on_cpu=on_cpu,
    )  # fmt: skip
