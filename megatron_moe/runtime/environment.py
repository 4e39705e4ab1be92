"""Environment variables of a process: settings for CUDA, and folders that caches may write to.

Set when the package `device` is imported, before torch reads them, so that a command started by
hand has the same as one from `launch/`. What is already set stays.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

CUDA = {
    # One hardware queue: kernels start in the order they were issued, so a tensor or context
    # parallel transfer launched before a product runs under it. The overlap settings rely on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Experts get another number of tokens every step; growing segments instead of hunting for a
    # block of the right size keeps that from fragmenting the memory.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # NVLink SHARP takes GPU memory for every communicator, folding makes many of them, and the
    # all-to-all of the experts cannot use it.
    "NCCL_NVLS_ENABLE": "0",
    # Libraries ask whether there is a GPU before ranks are forked. Asked of the driver, the answer
    # would leave CUDA unusable in them ("Cannot re-initialize CUDA in forked subprocess"); NVML's
    # does not. Our own question (gpus.visible_gpus) does not depend on NVML.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
}
"""Variable that a library reads, and our folder for it."""


def prepare() -> None:
    """Set what is missing."""
    settings = dict(CUDA)
    if "PYTORCH_ALLOC_CONF" in os.environ:  # torch's newer name for the same
        del settings["PYTORCH_CUDA_ALLOC_CONF"]
    if not has_home():
        settings |= cache_folders(Path(tempfile.gettempdir()) / f"megatron-moe-{os.getuid()}")
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def has_home() -> bool:
    """Return whether this user has a name and a home that takes files.

    Containers run with any user id: one that the system does not know has the home ``/`` and no
    name, which torch's compiler asks for where it is given no folder.
    """
    home = os.path.expanduser("~")
    return os.access(home, os.W_OK | os.X_OK) and user_name() != _numbered()


def user_name() -> str:
    """Return this user's name, or ``uid N`` where the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.12, and 3.13
        return _numbered()


def _numbered() -> str:
    return f"uid {os.getuid()}"


def cache_folders(root: Path) -> Mapping[str, str]:
    """Return the variables that let caches write below ``root``, a folder of this user's own."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():  # made by another user: do not run what lies there
        root = Path(tempfile.mkdtemp(prefix=f"{root.name}-"))
    return {variable: str(root / folder) for variable, folder in CACHES.items()}
