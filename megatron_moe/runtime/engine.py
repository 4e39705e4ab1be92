"""Choose the implementation of the layers that a run uses, separately from its device.

========================  ======  =====================================================
engine                    device  layers
========================  ======  =====================================================
torch                     cpu     torch-native modules; every test runs on them
torch                     cuda    the same modules with torch's CUDA kernels
transformer_engine        cuda    Transformer Engine's modules and fused kernels
========================  ======  =====================================================

Both engines read and write the same checkpoints. Layer specs, recomputation, fused kernels and the
planner depend on the engine; process groups and streams depend on the device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet

from megatron_moe.errors import ConfigError
from megatron_moe.runtime.together import gathered
from megatron_moe.runtime.torch_engine import (
    install_for_transformer_engine,
    install_torch_engine,
)
from megatron_moe.runtime.world import World

EngineName = Literal["torch", "transformer_engine"]
WantedEngine = Literal["auto", "torch", "transformer_engine"]
Device = Literal["cpu", "cuda"]

TRANSFORMER_ENGINE_VERSIONS = SpecifierSet(">=2.20,<3")
"""Supported versions of Transformer Engine, as in the extra gpu of pyproject.toml."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which CUDA GPUs multiply bf16 matrices (Ampere)."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An implementation of the layers on a device type."""

    name: EngineName
    device: Device
    reason: str = ""
    """Reason for the choice, for the log."""

    @property
    def on_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.device == "cuda"

    @property
    def is_torch(self) -> bool:
        """Whether the layers are the torch-native ones."""
        return self.name == "torch"


TORCH_ON_CPU = Engine("torch", "cpu")
TORCH_ON_CUDA = Engine("torch", "cuda")
TRANSFORMER_ENGINE = Engine("transformer_engine", "cuda")


def choose_engine(
    wanted: WantedEngine, *, device: Device, problem: Callable[[], str | None]
) -> Engine:
    """Choose the layers for a device.

    Args:
        wanted: ``run.engine``.
        device: Device type of the run.
        problem: Returns why Transformer Engine cannot be used, or None if it can. Called only if
            the answer matters.

    Raises:
        ConfigError: Transformer Engine is requested but cannot be used.
    """
    if device == "cpu":
        if wanted == "transformer_engine":
            raise ConfigError(
                "run.engine (transformer_engine) requires run.device=cuda, but this run uses the "
                "CPU: Transformer Engine has no CPU kernels.\n"
                "  set run.engine=torch or run.engine=auto"
            )
        return Engine("torch", "cpu", "the run is on the CPU")
    if wanted == "torch":
        return Engine("torch", "cuda", "requested by run.engine")
    obstacle = problem()
    if obstacle is None:
        version = installed_version()
        reason = "requested by run.engine" if wanted == "transformer_engine" else "installed"
        return Engine("transformer_engine", "cuda", f"version {version}; {reason}")
    if wanted == "transformer_engine":
        raise ConfigError(
            f"run.engine (transformer_engine) cannot be used: {obstacle}.\n"
            f"  install a version {TRANSFORMER_ENGINE_VERSIONS} (see docs/gpu.md), or set "
            "run.engine=torch, which needs only torch"
        )
    return Engine("torch", "cuda", obstacle)


def engine_of(wanted: WantedEngine, world: World) -> Engine:
    """Choose the layers on a rank that has joined its job, and patch Megatron-Core for them.

    Args:
        wanted: ``run.engine``.
        world: This rank's position in the job.

    Raises:
        ConfigError: Transformer Engine is requested but cannot be used, ranks differ, or the GPU is
            too old.
    """
    if world.device.type == "cpu":
        return engine_here(wanted, "cpu")
    check_capability(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    engine = engine_here(wanted, "cuda")
    choices = gathered(f"{engine.name} ({engine.reason})")
    if len(set(choices)) > 1:
        lines = [f"  rank {rank}: {choice}" for rank, choice in enumerate(choices)]
        raise ConfigError(
            f"run.engine ({wanted}) must resolve to the same engine on every rank: the machines "
            "have different versions of Transformer Engine.\n"
            + "\n".join(lines)
            + "\n  set run.engine=torch, or install the same packages on every machine"
        )
    if engine.is_torch:
        install_torch_engine(cuda=True)
    else:
        install_for_transformer_engine()
    return engine


def check_capability(device_name: str, capability: tuple[int, int]) -> None:
    """Refuse a GPU that is older than the kernels of both engines.

    Raises:
        ConfigError: The compute capability is below `LEAST_CAPABILITY`.
    """
    if capability < LEAST_CAPABILITY:
        least, actual = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        raise ConfigError(
            f"run.device (cuda) requires a GPU of compute capability {least} or newer, but the "
            f"{device_name} has {actual}: it has no bf16 matrix products and no flash attention.\n"
            "  use a newer GPU (A100, H100, or later), or set run.device=cpu"
        )


def engine_here(wanted: WantedEngine, device: Device) -> Engine:
    """Choose the layers in a process that will use them; this may import Transformer Engine."""
    return choose_engine(wanted, device=device, problem=lambda: problem_with(_import_here))


def engine_before_forking(wanted: WantedEngine, device: Device) -> Engine:
    """Choose the layers in a process that forks the ranks and must not touch the GPU itself.

    Importing Transformer Engine may initialize CUDA, after which forked processes cannot use it, so
    the import is tried in another process.
    """
    return choose_engine(wanted, device=device, problem=lambda: problem_with(_import_in_child))


def installed_version() -> str | None:
    """Return the installed version of Transformer Engine for PyTorch, without importing it."""
    if find_spec("transformer_engine") is None or find_spec("transformer_engine_torch") is None:
        return None
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("transformer-engine-torch")


def problem_with(try_import: Callable[[], str | None]) -> str | None:
    """Return why Transformer Engine cannot be used, or None if it can.

    Args:
        try_import: Tries the import and returns the error's text, or None.
    """
    version = installed_version()
    if version is None:
        return "Transformer Engine is not installed"
    if not TRANSFORMER_ENGINE_VERSIONS.contains(version, prereleases=True):
        return (
            f"Transformer Engine {version} is outside the supported versions "
            f"{TRANSFORMER_ENGINE_VERSIONS}"
        )
    error = try_import()
    return None if error is None else f"Transformer Engine {version} cannot be imported ({error})"


def _import_here() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library fails to load
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _import_in_child() -> str | None:
    command = [sys.executable, "-c", "import transformer_engine.pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
