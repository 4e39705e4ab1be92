"""Check the packages that a run needs on this machine.

Not among the rules of `check`: a laptop without them may plan a run of a cluster that has them.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError


def require_packages(config: RunConfig) -> None:
    """Reject a run whose outputs need a package that is not installed, or credentials.

    Raises:
        ConfigError: Weights & Biases is requested, and wandb is not installed or finds no
            credentials.
    """
    project = config.log.wandb_project
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb_project ({project}) requires the package wandb, which is not installed.\n"
            "  pip install 'megatron-moe[wandb]', or log.wandb_project=null"
        )
    if project is not None and not _wandb_can_start():
        raise ConfigError(
            f"log.wandb_project ({project}) requires credentials of Weights & Biases, and wandb "
            "finds none: it would ask for them in the middle of the run.\n"
            "  run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline to write files for "
            "wandb sync"
        )


def _wandb_can_start() -> bool:
    """Return whether wandb has credentials, which may be invalid, or needs none."""
    if os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled"):
        return True
    wandb = importlib.import_module("wandb")
    return bool(wandb.login(prompt=False, verify=False))
