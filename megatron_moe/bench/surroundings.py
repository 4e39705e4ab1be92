"""Describe where a benchmark runs: versions, commit, device, variables that change its speed."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.cuda import nccl

from megatron_moe.bench.record import Surroundings

GIB = 2**30
PACKAGES = ("megatron-core", "transformer-engine", "apex", "deep_ep", "transformers")
VARIABLES = ("NCCL_", "CUDA_", "NVTE_", "UCX_", "OMP_", "PYTORCH_CUDA_", "TORCH_NCCL_", "GLOO_")


def surroundings(device: torch.device) -> Surroundings:
    """This process's, and how many ranks and hosts there are; all ranks call it."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    name, memory_bytes = device_of(device)
    commit, changed = commit_of(Path(__file__).parent)
    return Surroundings(
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        commit=commit,
        uncommitted_changes=changed,
        versions=versions(),
        device=name,
        device_memory_gib=round(memory_bytes / GIB, 1),
        ranks=dist.get_world_size(),
        hosts=len(set(hosts)),
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a figure depends on."""
    result = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue  # what is not installed has no part in the result
    if torch.cuda.is_available():
        result["cuda"] = str(torch.version.cuda)
        result["nccl"] = ".".join(map(str, nccl.version()))
    return result


def device_of(device: torch.device) -> tuple[str, int]:
    """Return the device's name and the bytes of its memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    name = platform.processor() or platform.machine()
    return f"CPU, {os.cpu_count()} cores ({name})", psutil.virtual_memory().total


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the working tree around a folder, and whether tracked files changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None, None
