"""Which GPUs this process sees, and which of them a rank takes: one each, never a shared one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_moe.errors import ConfigError


def visible_gpus() -> int:
    """Count the CUDA devices that torch sees, and leave CUDA uninitialized in this process.

    A child is asked, because ranks are forked afterwards. torch counts through NVML, but where
    there is none (some containers, MIG) it initializes the driver, which no forked rank can use.
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
    return max(0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  # killed: no GPU


def gpu_of(local_rank: int, *, gpus: int) -> int:
    """Return the index of the GPU that a rank takes among the ``gpus`` that it sees.

    A launcher may show every rank its own GPU alone (SLURM's --gpus-per-task=1), so a single GPU
    is taken whatever the local rank is. `claim_gpu` then finds out whether it is shared.

    Raises:
        ConfigError: There is no GPU for this rank.
    """
    if local_rank < gpus:
        return local_rank
    if gpus == 1:
        return 0
    raise ConfigError(
        f"run.device (cuda) needs a GPU for every rank, but local rank {local_rank} sees {gpus}: "
        f"indices start at 0.\n  start at most {gpus} ranks on this machine, or set run.device=cpu"
    )


def claim_gpu(store: dist.Store, *, rank: int, uuid: str) -> None:
    """Take a GPU for this rank; ``store`` is the one where all ranks of the job meet.

    Raises:
        ConfigError: Another rank has taken it: NCCL would refuse the two later, without a name.
    """
    owner = store.compare_set(f"gpu/{uuid}", "", str(rank)).decode()
    if owner != str(rank):
        raise ConfigError(
            f"run.device (cuda) needs a GPU for every rank, but ranks {owner} and {rank} see the "
            f"same one only (GPU-{uuid}).\n  start one rank a GPU, show each rank another GPU "
            "(CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1), or set run.device=cpu"
        )
