"""What runs and where: degrees of parallelism over some GPUs, and the batch they work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.run import Parallel, RunConfig

Recompute = Literal["none", "selective", "moe", "full"]
"""What the backward pass computes again instead of keeping.

selective: Megatron-Core's modules moe_act and layernorm; moe: layernorm and the whole MoE layer;
full: every layer from its input.
"""

RECOMPUTE_SETTINGS: tuple[Recompute, ...] = ("none", "selective", "moe", "full")

ASSUMED_IMBALANCE = 1.15
"""Load of the busiest expert rank over the mean when nothing is measured: natural, dropless routing
of an upcycled model after its first steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Degrees of parallelism over ``gpus`` ranks; dp and edp are what is left."""

    gpus: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        """Replicas of the attention layers."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Replicas of the experts."""
        return self.gpus // (self.ep * self.etp * self.pp)

    def __str__(self) -> str:
        return (
            f"tp{self.tp} cp{self.cp} pp{self.pp} vpp{self.vpp} ep{self.ep} etp{self.etp} "
            f"dp{self.dp} edp{self.edp}"
        )

    def to_json(self) -> dict[str, int]:
        """Degrees by their short names, derived ones too."""
        names = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "edp")
        return {name: getattr(self, name) for name in names}

    def parallel(self) -> Parallel:
        """The same as a configuration section."""
        return Parallel(
            tensor_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_parallel_size=self.pp,
            virtual_pipeline_parallel_size=self.vpp if self.vpp > 1 else None,
            expert_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimizer step's work."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int = 1
    capacity_factor: float | None = None
    """Tokens an expert may take over the mean, ``T * K / E``; None drops nothing."""
    pad_to_capacity: bool = False
    """Every expert computes on its full capacity, filled with zeros."""
    imbalance: float = ASSUMED_IMBALANCE
    """Load of the busiest expert rank over the mean, before anything is dropped."""
    recompute: Recompute = "none"
    precision: Literal["fp32", "bf16"] = "bf16"
    engine: Literal["torch", "transformer_engine"] = "transformer_engine"
    """Implementation of the layers: torch's operations keep other tensors for the backward pass."""

    @property
    def recompute_settings(self) -> tuple[Recompute, ...]:
        """Settings that the engine has, from the fastest to the one that needs least memory."""
        if self.engine == "torch":
            return tuple(setting for setting in RECOMPUTE_SETTINGS if setting != "selective")
        return RECOMPUTE_SETTINGS

    @property
    def bytes_per_value(self) -> int:
        """Bytes of an activation or a weight."""
        return 2 if self.precision == "bf16" else 4

    @property
    def busiest_load(self) -> float:
        """Rows the busiest expert rank computes on, over the mean ``T * K / ep``."""
        if self.capacity_factor is None:
            return self.imbalance
        if self.pad_to_capacity:
            return self.capacity_factor
        return min(self.capacity_factor, self.imbalance)

    def micro_batches(self, degrees: Degrees) -> int:
        """Micro-batches of one replica in one step."""
        return self.global_batch_size // (self.micro_batch_size * degrees.dp)


def degrees_of(config: RunConfig, *, gpus: int) -> Degrees:
    """The layout that a configuration names, on ``gpus`` ranks."""
    parallel = config.parallel
    return Degrees(
        gpus=gpus,
        tp=parallel.tensor_parallel_size,
        cp=parallel.context_parallel_size,
        pp=parallel.pipeline_parallel_size,
        vpp=parallel.virtual_pipeline_parallel_size or 1,
        ep=parallel.expert_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
    )


def engine_assumed(config: RunConfig) -> Literal["torch", "transformer_engine"]:
    """Return the engine a plan counts with; ``auto`` means Transformer Engine, except on a CPU.

    A plan is made for other machines, so what is installed here does not matter.
    """
    if config.run.engine == "torch" or config.run.device == "cpu":
        return "torch"
    return "transformer_engine"


def workload_of(config: RunConfig) -> Workload:
    """The step that a configuration asks for."""
    return Workload(
        sequence_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        capacity_factor=config.moe.megatron_capacity_factor,
        pad_to_capacity=config.moe.moe_pad_expert_input_to_capacity,
        recompute=config.train.recompute,
        precision=config.train.precision,
        engine=engine_assumed(config),
    )
