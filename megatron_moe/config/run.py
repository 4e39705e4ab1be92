"""All settings of a run. Read this file first; each stage takes only its own section.

A setting that is passed to Megatron-Core unchanged keeps Megatron-Core's name, so a search finds it
in both code bases. A setting that we compute with first has a name of ours. Rules that need more
than one section (does tp divide the heads? does the world size fit the layout?) are checked by
``rules/check.py``, which also sees the dense model and the world size.
"""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.data import Data
from megatron_moe.config.moe import Measure, Moe, Source, Upcycle
from megatron_moe.config.parts import Frozen
from megatron_moe.config.train import Lora, Optimizer, Teacher, Train
from megatron_moe.config.values import (
    Count,
    HomePath,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
)


class Run(Section):
    """Location, seed, device and engine of the run."""

    dir: HomePath
    """Run directory: config.yaml, receipt.json, metrics.jsonl, checkpoints/."""

    seed: NonNegativeInt = 0
    """Seed of the data order. Weights do not depend on it; see upcycle.seed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if torch sees a GPU for every local rank, otherwise the CPU. The log names the
    device that was chosen."""

    engine: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Implementation of the layers. auto: Transformer Engine on CUDA if a supported version is
    installed, otherwise torch. Both read and write the same checkpoints."""


class Parallel(Section):
    """Degrees of parallelism. dp and edp follow from the world size, so they are not set."""

    tensor_parallel_size: Count = 1
    """Number of ranks that share the heads of an attention layer (tp)."""

    context_parallel_size: Count = 1
    """Number of ranks that share a sequence (cp)."""

    pipeline_parallel_size: Count = 1
    """Number of pipeline stages, each a run of consecutive layers (pp)."""

    virtual_pipeline_parallel_size: Count | None = None
    """Number of interleaved model chunks per pipeline rank (vpp). None or 1: one."""

    num_layers_in_first_pipeline_stage: Count | None = None
    """Number of layers of the first pipeline stage. Set it, or the next one, if the stages cannot
    be equally large, or to give a stage less work. None: as many as any other stage."""

    num_layers_in_last_pipeline_stage: Count | None = None
    """Number of layers of the last pipeline stage, which also computes logits and loss. None: as
    many as any other stage."""

    pipeline_model_parallel_layout: str | None = None
    """Layers of each model chunk, in Megatron-Core's notation: E is the embedding, t a layer, L
    logits and loss, and | ends a chunk. 'Et|(tt|)*2,tL' is Et|tt|tt|tL. The pp * vpp chunks are in
    the order of the layers. None: equal stages, or by the two settings above."""

    expert_parallel_size: Count = 1
    """Number of ranks that share the experts of a layer; each holds whole experts (ep)."""

    expert_tensor_parallel_size: Count = 1
    """Number of ranks that share the neurons of an expert (etp)."""

    adapt_to_ranks: bool = False
    """If this layout is not legal for the number of ranks that were started, train with the nearest
    legal one, and log it. For restarts with fewer machines, as torchrun makes them."""


class Checkpoint(Section):
    """Interval between checkpoints, and their number."""

    interval: Count = 1000
    """Number of steps between checkpoints. The last step is always saved."""

    keep: Count = 3
    """Number of newest checkpoints to keep on disk."""

    async_save: bool = False
    """Write checkpoints in the background while training continues. Needs host memory for a copy of
    the state."""

    local_dir: HomePath | None = None
    """Folder on a disk of each node. Every local_interval steps, each rank writes its state there
    and to the next node's, once the run has a checkpoint. A restart under the same layout then
    reads no weights from run.dir, also if one node lost its disk. None: no local copies."""

    local_interval: Count = 100
    """Number of steps between local copies, of which the newest is kept. At most interval."""


class Guard(Section):
    """Which failures a run survives, and when it gives up."""

    max_skipped_steps: NonNegativeInt = 10
    """Number of consecutive steps without a finite loss and gradient norm that may be skipped
    before the run stops. A skipped step changes no weights but counts for the schedule and the
    data."""

    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """If the loss exceeds this multiple of the mean of the previous 16 steps, restore the newest
    checkpoint and skip the batches seen since. None: accept any finite loss."""

    hang_seconds: Positive = 1800
    """End the job if no rank makes progress for this many seconds, and name the stuck rank. Set it
    above the duration of the longest load, validation or save."""

    device_check_interval: Count | None = None
    """Every this many steps, compute the step's loss and gradients a second time, on the devices of
    another replica of the model, and end the job if the numbers differ. Finds devices and memory
    that compute wrong numbers without an error; costs about one step each time. With one replica,
    the same devices repeat the step. None: never."""

    save_retry_seconds: NonNegative = 600
    """Keep retrying the last save of a job for this many seconds if the disk refuses it. Earlier
    saves are retried after checkpoint.interval steps."""


class Log(Section):
    """Destinations of metrics besides metrics.jsonl, and warnings about routers."""

    tensorboard: bool = True
    """Write TensorBoard files to run.dir/tensorboard."""

    wandb_project: str | None = None
    """Name of a Weights & Biases project. Requires the extra wandb. All jobs of a run write to one
    run there; with WANDB_MODE=offline, to files for `wandb sync`."""

    mlflow_experiment: str | None = None
    """Name of an MLflow experiment, at the server that the environment variable MLFLOW_TRACKING_URI
    names. Requires the extra mlflow. All jobs of a run write to one run there."""

    router_warning_steps: Count = 100
    """Warn about a router after this many consecutive steps in which an expert got no token, K
    experts got 99% of the choices (collapse), or the load exceeded router_max_load."""

    router_max_load: Annotated[float, Field(gt=1)] | None = None
    """Bound for the warning on the load of a layer's busiest expert, in multiples of the mean.
    None: no bound."""


class RunConfig(Section):
    """The whole configuration of a run, one section per stage."""

    run: Run
    source: Source
    moe: Moe
    upcycle: Upcycle = Upcycle()
    measure: Measure = Measure()
    parallel: Parallel = Parallel()
    data: Data
    train: Train
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    teacher: Teacher = Teacher()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    log: Log = Log()

    def frozen_after(self, step: int) -> Frozen:
        """Return the parts that are frozen in the step after ``step``."""
        return Frozen.named(self.train.freeze_after(step)).with_roles(self.lora.frozen)

    @property
    def always_frozen(self) -> Frozen:
        """Parts that are never trained."""
        return reduce(Frozen.__and__, map(self.frozen_after, self.train.stage_starts()))
