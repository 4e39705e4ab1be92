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
    """Reject a run whose outputs need a package, credentials or an address that are missing.

    Raises:
        ConfigError: A sink of ``config.log`` is requested and cannot start on this machine.
    """
    log = config.log
    for setting, value, package, wanted in (
        ("log.tensorboard", "true", "tensorboard", "tensorboard" if log.tensorboard else None),
        ("log.wandb_project", log.wandb_project, "wandb", log.wandb_project),
        ("log.mlflow_experiment", log.mlflow_experiment, "mlflow", log.mlflow_experiment),
    ):
        if wanted is not None and find_spec(package) is None:
            off, install = ("false", package) if setting == "log.tensorboard" else (
                "null", f"'megatron-moe[{package}]'"
            )  # fmt: skip
            raise ConfigError(
                f"{setting} ({value}) requires the package {package}, which is not installed.\n"
                f"  pip install {install}, or {setting}={off}"
            )
    if log.wandb_project is not None and not _wandb_can_start():
        raise ConfigError(
            f"log.wandb_project ({log.wandb_project}) requires credentials of Weights & Biases, "
            "and wandb finds none: it would ask for them in the middle of the run.\n"
            "  run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline to write files for "
            "wandb sync"
        )
    if log.mlflow_experiment is not None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            f"log.mlflow_experiment ({log.mlflow_experiment}) requires the environment variable "
            "MLFLOW_TRACKING_URI, which is not set: MLflow would write to a folder or database "
            "under the current one, and each job of a run perhaps to another.\n"
            "  export MLFLOW_TRACKING_URI=http://HOST:5000, or log.mlflow_experiment=null"
        )


def _wandb_can_start() -> bool:
    """Return whether wandb has credentials, which may be invalid, or needs none."""
    if os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled"):
        return True
    wandb = importlib.import_module("wandb")
    return bool(wandb.login(prompt=False, verify=False))
