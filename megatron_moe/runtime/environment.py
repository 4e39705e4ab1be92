"""Set environment variables of a process: settings for CUDA, and writable cache folders.

This happens when the package `runtime` is imported, before torch reads the variables, so that a
command started by hand has the same settings as one from `launch/`. Existing values are kept.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

CUDA = {
    # One hardware queue: kernels start in launch order, so a tensor or context parallel transfer
    # that is launched before a matrix product overlaps with it. The overlap settings rely on this.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Experts get a different number of tokens at every step. Segments that grow, instead of a
    # search for a block of the right size, keep this from fragmenting the memory.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # NVLink SHARP allocates GPU memory for every communicator. Parallel folding creates many of
    # them, and the all-to-all of the experts cannot use it.
    "NCCL_NVLS_ENABLE": "0",
    # Libraries check for a GPU before ranks are forked. A check through the driver would make CUDA
    # unusable in the ranks ("Cannot re-initialize CUDA in forked subprocess"); one through NVML
    # does not. Our own check (gpus.visible_gpus) does not depend on NVML.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
}
"""Maps the variable that a library reads to our cache folder for it."""


def prepare() -> None:
    """Set the variables that are not set yet."""
    settings = dict(CUDA)
    if "PYTORCH_ALLOC_CONF" in os.environ:  # torch's newer name of the variable
        del settings["PYTORCH_CUDA_ALLOC_CONF"]
    if not has_home():
        settings |= cache_folders(Path(tempfile.gettempdir()) / f"megatron-moe-{os.getuid()}")
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def has_home() -> bool:
    """Return whether this user has a name and a writable home.

    Containers may run with any user id. A user id that is unknown to the system has the home ``/``
    and no name, but torch's compiler needs a name if it is given no cache folder.
    """
    home = os.path.expanduser("~")
    return os.access(home, os.W_OK | os.X_OK) and user_name() != _numbered()


def user_name() -> str:
    """Return this user's name, or ``uid N`` if the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.12, and 3.13
        return _numbered()


def _numbered() -> str:
    return f"uid {os.getuid()}"


def cache_folders(root: Path) -> Mapping[str, str]:
    """Return variables that place caches below ``root``, a folder that this user owns."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():  # owned by another user: do not execute files from there
        root = Path(tempfile.mkdtemp(prefix=f"{root.name}-"))
    return {variable: str(root / folder) for variable, folder in CACHES.items()}
