"""Count visible GPUs, and assign one GPU to each rank; ranks never share a GPU."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_moe.errors import ConfigError


def visible_gpus() -> int:
    """Count the CUDA devices that torch sees, without initializing CUDA in this process.

    A child process counts, because ranks are forked later. torch counts through NVML, but without
    NVML (some containers, MIG) it initializes the driver, and forked ranks could not use CUDA.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.device_count()
    child = os.fork()
    if child == 0:
        count = 0
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        finally:
            os._exit(count)
    return max(
        0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    )  # a killed child counts as no GPU


def gpu_of(local_rank: int, *, gpus: int) -> int:
    """Return the index of a rank's GPU among the ``gpus`` that it sees.

    A launcher may show each rank only its own GPU (SLURM's --gpus-per-task=1), so a single GPU is
    used for any local rank. `claim_gpu` then detects whether it is shared.

    Raises:
        ConfigError: There is no GPU for this rank.
    """
    if local_rank < gpus:
        return local_rank
    if gpus == 1:
        return 0
    raise ConfigError(
        f"run.device (cuda) needs a GPU for every rank, but local rank {local_rank} sees {gpus} "
        f"(ranks start at 0).\n  start at most {gpus} ranks on this machine, or set run.device=cpu"
    )


def claim_gpu(store: dist.Store, *, rank: int, uuid: str) -> None:
    """Claim a GPU for this rank in ``store``, the store that all ranks of the job share.

    Raises:
        ConfigError: Another rank has claimed it. NCCL would fail later, without naming the ranks.
    """
    owner = store.compare_set(f"gpu/{uuid}", "", str(rank)).decode()
    if owner != str(rank):
        raise ConfigError(
            f"run.device (cuda) needs a GPU for every rank, but ranks {owner} and {rank} "
            f"share one (GPU-{uuid}).\n  start one rank per GPU, give each rank its own GPU "
            "(CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1), or set run.device=cpu"
        )
