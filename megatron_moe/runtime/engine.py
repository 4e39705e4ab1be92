"""Which implementation of the layers a run uses, apart from the device it runs on.

========================  ======  =====================================================
engine                    device  layers
========================  ======  =====================================================
torch                     cpu     torch's operations and ours; every test runs on them
torch                     cuda    the same modules, with the kernels torch has for CUDA
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
    """An implementation of the layers on a kind of device."""

    name: EngineName
    device: Device
    reason: str = ""
    """Why it was chosen, for the log."""

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
        device: What the run computes on.
        problem: Says why Transformer Engine cannot be used, or returns None if it can. Called only
            if the answer matters.

    Raises:
        ConfigError: Transformer Engine is wanted and cannot be used.
    """
    if device == "cpu":
        if wanted == "transformer_engine":
            raise ConfigError(
                "run.engine (transformer_engine) needs run.device to be cuda, but this run uses "
                "the CPU: Transformer Engine has no kernels for it.\n"
                "  set run.engine=torch or run.engine=auto"
            )
        return Engine("torch", "cpu", "the run is on the CPU")
    if wanted == "torch":
        return Engine("torch", "cuda", "run.engine asks for it")
    why_not = problem()
    if why_not is None:
        version = installed_version()
        reason = "run.engine asks for it" if wanted == "transformer_engine" else "it is installed"
        return Engine("transformer_engine", "cuda", f"version {version}; {reason}")
    if wanted == "transformer_engine":
        raise ConfigError(
            f"run.engine (transformer_engine) cannot be used: {why_not}.\n"
            f"  install a version {TRANSFORMER_ENGINE_VERSIONS} (docs/gpu.md says how), or set "
            "run.engine=torch, which needs nothing more than torch"
        )
    return Engine("torch", "cuda", why_not)


def engine_of(wanted: WantedEngine, world: World) -> Engine:
    """Choose the layers on a rank that has joined its job, and make Megatron-Core ready for them.

    Args:
        wanted: ``run.engine``.
        world: This rank's place in the joined job.

    Raises:
        ConfigError: Transformer Engine is wanted and cannot be used, or ranks choose differently.
    """
    if world.device.type == "cpu":
        return engine_here(wanted, "cpu")
    engine = engine_here(wanted, "cuda")
    choices = gathered(f"{engine.name} ({engine.reason})")
    if len(set(choices)) > 1:
        lines = [f"  rank {rank}: {choice}" for rank, choice in enumerate(choices)]
        raise ConfigError(
            f"run.engine ({wanted}) must mean the same on every rank, but ranks differ: their "
            "machines have different versions of Transformer Engine.\n"
            + "\n".join(lines)
            + "\n  set run.engine=torch, or install the same packages on every machine"
        )
    if engine.is_torch:
        install_torch_engine(cuda=True)
    else:
        install_for_transformer_engine()
    return engine


def engine_here(wanted: WantedEngine, device: Device) -> Engine:
    """Choose the layers in a process that will use them; Transformer Engine is imported."""
    return choose_engine(wanted, device=device, problem=lambda: problem_with(_import_here))


def engine_before_forking(wanted: WantedEngine, device: Device) -> Engine:
    """Choose the layers in a process that forks the ranks, which must not touch the GPU itself.

    Importing Transformer Engine may initialize CUDA, after which forked processes cannot use it. So
    another process tries the import.
    """
    return choose_engine(wanted, device=device, problem=lambda: problem_with(_import_in_child))


def installed_version() -> str | None:
    """Return the installed version of Transformer Engine's PyTorch part; nothing is imported."""
    if find_spec("transformer_engine") is None or find_spec("transformer_engine_torch") is None:
        return None
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("transformer-engine-torch")


def problem_with(try_import: Callable[[], str | None]) -> str | None:
    """Say why Transformer Engine cannot be used, or return None if it can.

    Args:
        try_import: Imports it somewhere and returns the error's text, or None.
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
    return None if error is None else f"Transformer Engine {version} does not import ({error})"


def _import_here() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library that does not load
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _import_in_child() -> str | None:
    command = [sys.executable, "-c", "import transformer_engine.pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
