"""Models whose training step is timed, and what both sides are told about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense import config_of, random_dense
from harness import ROOT

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.flops import forward_flops, training_flops
from megatron_moe.planner.shape import upcycled_shape

SMOLLM2 = ROOT / "runs" / "models" / "smollm2-135m"
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
"""Optimizer settings of both sides; ours are `train.state.optimizer_config`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model, one batch, one dtype."""

    name: str
    sizes: dict[str, int]
    experts: int = 8
    topk: int = 2
    seq_length: int = 512
    batch: int = 4
    precision: str = "fp32"
    rounds: int = 3
    resident: bool = True
    """Both sides fit into memory at once; else they come one after the other, round after round."""
    layout: str = "ep2"
    """Layout of the runs on two ranks."""
    target: float | None = None
    """Target of the ratio to the peer; None if only our own MFU has a target."""
    mfu_target: float | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """Sides that take turns."""
        return ("ours",) if self.target is None else ("peer", "ours", "ranks2")

    def dense(self, folder: Path) -> Path:
        """The dense model: SmolLM2's real weights where they are, else random ones of the shape."""
        if self.name.startswith("smollm2") and (SMOLLM2 / "model.safetensors").exists():
            return SMOLLM2
        more = {"tie_word_embeddings": True} if self.name.startswith("smollm2") else {}
        return random_dense(folder / self.name, config_of(**self.sizes, **more))

    def config(self, dense: Path, folder: Path, ranks: int) -> RunConfig:
        """Return our settings, without a balancing loss: the peer's is expensive and turned off."""
        degree = {"ep2": {"expert_parallel_size": 2}, "tp2": {"tensor_parallel_size": 2}}
        settings: dict[str, dict[str, Any]] = {
            "run": {"dir": str(folder / f"run-{ranks}"), "device": "cpu"},
            "source": {"path": str(dense)},
            "moe": {
                "num_moe_experts": self.experts,
                "moe_router_topk": self.topk,
                "moe_router_load_balancing_type": "none",
            },
            "upcycle": {"verify": "never"},
            "parallel": degree.get(self.layout, {}) if ranks > 1 else {},
            "data": {"path": "none", "seq_length": self.seq_length},
            "train": {
                "steps": 10_000,
                "global_batch_size": self.batch,
                "micro_batch_size": self.batch // (ranks if self.layout != "tp2" else 1),
                "precision": self.precision,
            },
            "optimizer": {
                "lr": ADAMW["lr"],
                "min_lr": ADAMW["lr"],
                "warmup_steps": 0,
                "weight_decay": ADAMW["weight_decay"],
                "clip_grad": ADAMW["clip"],
            },
            "log": {"tensorboard": False},
        }
        return build(RunConfig, settings)

    def flops(self, config: RunConfig) -> int:
        """Matrix products of a step; of attention only the triangle that a causal model needs."""
        shape = upcycled_shape(read_spec(config.source.path), config.moe)
        forward = forward_flops(
            shape, sequence_length=self.seq_length, batch_size=self.batch, causal=True
        )
        return training_flops(forward.model)


BASE = {"layers": 8, "hidden": 512, "ffn": 1536, "heads": 8, "kv_heads": 8, "vocab": 8192}
FINE = {**BASE, "layers": 4, "ffn": 192}
WIDE = {"layers": 2, "hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 16, "vocab": 8192}
SMOL = {"layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152}

CASES = {
    case.name: case
    for case in (
        Case(name="base-fp32", sizes=BASE, target=1.15),
        Case(name="base-bf16", sizes=BASE, precision="bf16", target=1.4),
        Case(name="fine-fp32", sizes=FINE, experts=64, topk=8, rounds=2, target=2.0),
        Case(name="fine-bf16", sizes=FINE, experts=64, topk=8, rounds=2, precision="bf16",
             target=2.0),
        Case(name="wide-fp32", sizes=WIDE, mfu_target=0.8),
        Case(name="wide-bf16", sizes=WIDE, precision="bf16", mfu_target=0.7),
        Case(name="smollm2-fp32", sizes=SMOL, batch=2, rounds=2, resident=False, target=1.3),
        Case(name="smollm2-bf16", sizes=SMOL, batch=2, rounds=2, resident=False, target=1.3,
             precision="bf16"),
    )
}  # fmt: skip
