"""Check the packages that a run needs on this machine.

Not among the rules of `check`: a laptop without them may plan a run of a cluster that has them.
"""

from __future__ import annotations

from importlib.util import find_spec

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError


def require_packages(config: RunConfig) -> None:
    """Reject a run whose outputs need a package that is not installed.

    Raises:
        ConfigError: Weights & Biases is requested, and wandb is not installed.
    """
    project = config.log.wandb_project
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb_project ({project}) requires the package wandb, which is not installed.\n"
            "  pip install 'megatron-moe[wandb]', or log.wandb_project=null"
        )
