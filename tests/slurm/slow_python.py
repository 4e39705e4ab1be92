"""Stand in for ``python`` in launch/slurm.sbatch: the same program with slower steps.

Ranks call an observer as they enter a stage of a step (`commands.train.train`). This one waits, so
that a job of a tiny model lasts long enough to be interrupted.
"""

import os
import sys
import time

from megatron_moe.cli import main as cli


def pause(stage: str, step: int) -> None:
    """Wait at the start of each step."""
    if stage == "forward":
        time.sleep(float(os.environ["STEP_SECONDS"]))


def slow_train(config, world) -> None:
    """Stand in for the function that runs ``train`` on a rank."""
    from megatron_moe.commands.train import train

    train(config, world, observe=pause)


if __name__ == "__main__":
    cli._train = slow_train
    sys.argv = ["megatron-moe", *sys.argv[sys.argv.index("megatron_moe") + 1 :]]
    sys.exit(cli.main())
