"""Checkpoint folders that hold all that real ones do, with one file in place of the tensors."""

from pathlib import Path

from megatron_moe.checkpoint.folder import Progress, describe, publish, start_folder, step_folder
from megatron_moe.config.load import build, dump
from megatron_moe.config.run import RunConfig

CONFIG = build(
    RunConfig,
    {
        "run": {"dir": "run"},
        "source": {"path": "dense"},
        "moe": {"num_moe_experts": 4, "moe_layers": [0, 2]},
        "data": {"path": "text"},
        "train": {"steps": 3},
        "optimizer": {"lr": 3e-4},
    },
)


def progress(step: int) -> Progress:
    return Progress(
        step=step,
        samples=8 * step,
        plan_hash="abc",
        optimizer_updates=step,
        world_size=4,
        precision="fp32",
        blend={},
    )


def save(run: Path, step: int, dense: Path) -> Path:
    """Save like `Saver.save`, but with one file in place of the tensors."""
    final = step_folder(run, step)
    partial = start_folder(final)
    (partial / "tensors.distcp").write_text(f"tensors of {step}")
    describe(partial, progress(step), dump(CONFIG), dense)
    publish(partial, final)
    return final


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
