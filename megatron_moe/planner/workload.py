"""Degrees of parallelism over a number of GPUs, and the batch of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.parts import ALL_TRAINED, Frozen
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.config.train import OptimizerName
from megatron_moe.parallel.layout import split_of
from megatron_moe.parallel.stages import EVEN, PipelineSplit, stage_sizes
from megatron_moe.planner.shape import MoeShape

Engine = Literal["torch", "transformer_engine"]
"""Implementation of the layers, with ``auto`` resolved."""

Recompute = Literal["none", "selective", "moe", "full"]
"""Activations that the backward pass recomputes instead of keeping.

selective: Megatron-Core's modules moe_act and layernorm; moe: layernorm and the whole MoE layer;
full: every layer from its input.
"""

RECOMPUTE_SETTINGS: tuple[Recompute, ...] = ("none", "selective", "moe", "full")

ASSUMED_IMBALANCE = 1.15
"""Load of the busiest expert rank relative to the mean if no measurement is given: natural,
dropless routing of an upcycled model after its first steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Degrees of parallelism over ``gpus`` ranks; dp and edp are derived."""

    gpus: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    split: PipelineSplit = EVEN
    """Layers of the pipeline stages, if they are not equally many."""

    @property
    def dp(self) -> int:
        """Number of replicas of the attention layers."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Number of replicas of the experts."""
        return self.gpus // (self.ep * self.etp * self.pp)

    def stage_shares(self, num_layers: int) -> list[float]:
        """Return each stage's part of the layers."""
        sizes = stage_sizes(num_layers, self.pp, self.split)
        assert sizes is not None, "the rules refuse other layouts"
        return [size / num_layers for size in sizes]

    def __str__(self) -> str:
        return (
            f"tp{self.tp} cp{self.cp} pp{self.pp} vpp{self.vpp} ep{self.ep} etp{self.etp} "
            f"dp{self.dp} edp{self.edp}"
        )

    def to_json(self) -> dict[str, int]:
        """Return the degrees by their short names, including dp and edp."""
        names = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "edp")
        return {name: getattr(self, name) for name in names}

    def parallel(self) -> Parallel:
        """Return the degrees as a configuration section."""
        return Parallel(
            tensor_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_parallel_size=self.pp,
            virtual_pipeline_parallel_size=self.vpp if self.vpp > 1 else None,
            expert_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            num_layers_in_first_pipeline_stage=self.split.first,
            num_layers_in_last_pipeline_stage=self.split.last,
            pipeline_model_parallel_layout=self.split.layout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePrecision:
    """Bytes per element of gradients and optimizer state; the defaults are Megatron-Core's."""

    gradient: int = 4
    """The buffer that accumulates gradients (``grad_reduce_in_fp32``)."""
    master: int = 4
    """Master weights; an fp32 run has none."""
    moments: int = 8
    """Both moments of Adam on the GPU; 4 in bf16, 0 in host memory."""
    host: int = 0
    """Both moments of Adam in host memory."""
    momentum: int = 4
    """Muon's momentum of matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherWork:
    """The teacher's part of a step."""

    shape: MoeShape
    """The teacher."""
    logits: bool
    """Whether all of it runs, for its logits."""
    layers: bool
    """Whether its FFNs run on the inputs of MoE layers."""
    router: bool
    """Whether each expert's share of these FFNs is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work of one optimizer step."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int = 1
    capacity_factor: float | None = None
    """Maximum tokens of an expert relative to the mean, ``T * K / E``; None drops no token."""
    pad_to_capacity: bool = False
    """Whether each expert's input is padded with zeros to its full capacity."""
    imbalance: float = ASSUMED_IMBALANCE
    """Load of the busiest expert rank relative to the mean, before tokens are dropped."""
    recompute: Recompute = "none"
    precision: Literal["fp32", "bf16"] = "bf16"
    tp_comm_overlap: bool = False
    """Whether all tp collectives overlap with products, in pieces (``train.tp_comm_overlap``)."""
    expert_overlap: bool = False
    """Whether the all-to-all over ep overlaps with the other pass of another micro-batch
    (``train.overlap_moe_expert_parallel_comm``)."""
    engine: Engine = "transformer_engine"
    """Implementation of the layers; it determines which tensors the backward pass keeps."""
    frozen: Frozen = ALL_TRAINED
    """Parts that have no gradients and no optimizer state."""
    optimizer: OptimizerName = "adam"
    """Optimizer, which determines the bytes of its state."""
    state: StatePrecision = StatePrecision()
    """Bytes per element of gradients and optimizer state."""
    device_check_interval: int | None = None
    """Steps between two that are computed twice (``guard.device_check_interval``)."""
    teacher: TeacherWork | None = None
    """Work of the teacher, if there is one; see ``planner/teacher.py``."""

    @property
    def recompute_settings(self) -> tuple[Recompute, ...]:
        """Settings that the engine supports, from the fastest to the one with the least memory."""
        if self.engine == "torch":
            return tuple(setting for setting in RECOMPUTE_SETTINGS if setting != "selective")
        return RECOMPUTE_SETTINGS

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one activation or weight value."""
        return 2 if self.precision == "bf16" else 4

    @property
    def busiest_load(self) -> float:
        """Rows of the busiest expert rank relative to the mean ``T * K / ep``."""
        if self.capacity_factor is None:
            return self.imbalance
        if self.pad_to_capacity:
            return self.capacity_factor
        return min(self.capacity_factor, self.imbalance)

    def micro_batches(self, degrees: Degrees) -> int:
        """Return the number of micro-batches of one replica in one step."""
        return self.global_batch_size // (self.micro_batch_size * degrees.dp)


def degrees_of(config: RunConfig, *, gpus: int) -> Degrees:
    """Return the layout of a configuration on ``gpus`` ranks."""
    parallel = config.parallel
    return Degrees(
        gpus=gpus,
        tp=parallel.tensor_parallel_size,
        cp=parallel.context_parallel_size,
        pp=parallel.pipeline_parallel_size,
        vpp=parallel.virtual_pipeline_parallel_size or 1,
        ep=parallel.expert_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        split=split_of(parallel),
    )


def engine_assumed(config: RunConfig) -> Engine:
    """Return the engine to predict for; ``auto`` means Transformer Engine, except on a CPU.

    The prediction is for other machines, so the packages installed here do not matter.
    """
    if config.run.engine == "torch" or config.run.device == "cpu":
        return "torch"
    return "transformer_engine"


def state_precision(config: RunConfig) -> StatePrecision:
    """Return the bytes of gradients and optimizer state of a configuration."""
    moments, on_host = config.optimizer.moment_bytes, config.optimizer.optimizer_cpu_offload
    return StatePrecision(
        gradient=4 if config.train.grad_reduce_in_fp32 else 2,
        moments=0 if on_host else moments,
        host=moments if on_host else 0,
    )


def workload_of(config: RunConfig) -> Workload:
    """Return the work of one step of a configuration; with stages, of the one that needs most.

    The work of a teacher is not included; see `planner.teacher.with_teacher`.
    """
    return Workload(
        sequence_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        capacity_factor=config.moe.megatron_capacity_factor,
        pad_to_capacity=config.moe.moe_pad_expert_input_to_capacity,
        recompute=config.train.recompute,
        precision=config.train.precision,
        tp_comm_overlap=config.train.tp_comm_overlap,
        expert_overlap=config.train.overlap_moe_expert_parallel_comm,
        engine=engine_assumed(config),
        frozen=config.always_frozen,
        optimizer=config.optimizer.optimizer,
        state=state_precision(config),
        device_check_interval=config.guard.device_check_interval,
    )
