"""Check 5: save, kill, resume and export a run, and copy between host and device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from gpu_checks.inputs import ROOT, tiny_config
from gpu_checks.parity import losses
from gpu_checks.session import Session, passed
from gpu_checks.timing import milliseconds
from megatron_moe.config.load import dump
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.world import World

EXPORT_ERROR = 1e-4
"""Nats per token between the trainer's held-out loss and transformers' on the export, in fp32."""
PINNED_GB_PER_SECOND = 20.0
"""Rate that PCIe 5 with 16 lanes should exceed by far: 63 GB/s on the data sheet."""


def resume(session: Session) -> None:
    """Compare losses of runs that were resumed with those of runs that were not."""
    steps, interval = session.size((60, 10), (8, 2))
    settings = {
        "train": {"steps": steps, "global_batch_size": 4, "precision": "bf16"},
        "checkpoint": {"interval": interval, "keep": 100},
        "data": {"validation_path": str(session.folder / "held-out"), "validation_samples": 4},
    }
    runs = {
        name: tiny_config(session, f"resume-{name}", **settings) for name in ("whole", "repeat")
    }
    settings["checkpoint"]["async_save"] = True
    killed = tiny_config(session, "resume-killed", **settings)
    back_to = steps // interval // 2 * interval
    session.on_rank(partial(_train_repeat_and_rewind, session, runs, back_to))
    _kill_and_resume(session, killed, after=back_to)
    expected = losses(runs["whole"])
    for what, config in (
        ("resumed from a checkpoint", runs["repeat"]),
        ("killed while saving, resumed", killed),
    ):
        _compare(session, what, losses(config), expected)
    session.on_rank(partial(_bandwidth, session))
    _export(session, tiny_config(session, "resume-fp32", **_in_fp32(settings, interval)))


def _in_fp32(settings: dict[str, dict[str, object]], steps: int) -> dict[str, dict[str, object]]:
    train = {**settings["train"], "precision": "fp32", "steps": steps}
    return {**settings, "train": train}


def _train_repeat_and_rewind(
    session: Session, runs: dict[str, RunConfig], step: int, world: World
) -> None:
    """Train a run twice, and the second once more from its checkpoint of ``step``."""
    from megatron_moe.checkpoint.folder import step_folder

    _train(runs["whole"], world)
    _train(runs["repeat"], world)
    _compare(session, "the same run again", losses(runs["repeat"]), losses(runs["whole"]))
    run_dir = runs["repeat"].run.dir
    (run_dir / "checkpoints" / "latest").write_text(step_folder(run_dir, step).name)
    _train(runs["repeat"], world)


def _train(config: RunConfig, world: World) -> None:
    from megatron_moe.commands.train import train
    from megatron_moe.parallel.groups import destroy_groups

    train(config, world)
    destroy_groups()


def _compare(session: Session, what: str, result: list[float], expected: list[float]) -> None:
    differ = [
        step for step, pair in enumerate(zip(result, expected, strict=True), 1) if len({*pair}) > 1
    ]
    worst = max(abs(a - b) for a, b in zip(result, expected, strict=True))
    session.add(
        what, "equal" if not differ else f"differ from step {differ[0]} on, by up to {worst:.1e}",
        expected="losses equal bit for bit", verdict=passed(not differ),
        first_step_that_differs=differ[:1], largest_difference=worst,
    )  # fmt: skip


def _kill_and_resume(session: Session, config: RunConfig, *, after: int) -> None:
    """Run the command as a user does, kill it once step ``after`` is logged, and run it again."""
    path = config.run.dir / "settings.yaml"
    path.write_text(dump(config))
    command = [sys.executable, "-m", "megatron_moe", "train", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    while process.poll() is None and _last_step(config.run.dir) < after:
        time.sleep(0.002)
    at = _last_step(config.run.dir)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    session.add("killed after step", str(at), step=at)


def _last_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _export(session: Session, config: RunConfig) -> None:
    """Train a few steps, export the run, and take its held-out loss with transformers."""
    session.on_rank(partial(_train, config))
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    trained = json.loads(lines[-1])["loss/validation"]
    session.on_rank(partial(_score_export, session, config, trained))


def _score_export(session: Session, config: RunConfig, trained: float, world: World) -> None:
    from megatron_moe.commands.export import export_checkpoint
    from megatron_moe.data.samples import Samples
    from megatron_moe.data.stream import TokenStream
    from megatron_moe.hf.load import load_model

    out = config.run.dir / "hf"
    architecture = export_checkpoint(config.run.dir, out)
    assert config.data.validation_path is not None
    stream = TokenStream(config.data.validation_path, vocab_size=257)
    samples = Samples(stream, seq_length=config.data.seq_length, seed=0)
    count = min(config.data.validation_samples, samples.num_chunks)
    ids_NT = torch.stack([torch.from_numpy(samples.chunk(i).ids_T.copy()) for i in range(count)])
    ids_NT = ids_NT.to(world.device).long()
    model = load_model(out, device=session.device, dtype=torch.float32)
    with torch.no_grad():
        logits_NSV = model(ids_NT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_NSV.flatten(0, 1), ids_NT[:, 1:].flatten())
    error = abs(float(loss) - trained)
    session.add(
        f"held-out loss of the export ({architecture})", f"differs by {error:.1e}",
        expected=f"<= {EXPORT_ERROR:.0e} from the trainer's", verdict=passed(error <= EXPORT_ERROR),
        transformers=float(loss), trainer=trained,
    )  # fmt: skip


def _bandwidth(session: Session, world: World) -> None:
    """Measure copies between host and device, from pageable and from pinned memory."""
    device, count = world.device, session.size(2**30, 2**22)
    there = torch.ones(count, dtype=torch.uint8, device=device)
    pageable = torch.ones(count, dtype=torch.uint8)
    copies = {
        "to the host, pageable": lambda: pageable.copy_(there),
        "to the device, pageable": lambda: there.copy_(pageable),
    }
    if device.type == "cuda":
        pinned = torch.ones(count, dtype=torch.uint8, pin_memory=True)
        copies |= {
            "to the host, pinned": lambda: pinned.copy_(there, non_blocking=True),
            "to the device, pinned": lambda: there.copy_(pinned, non_blocking=True),
        }
    for what, copy in copies.items():
        speed = count / milliseconds(copy, device, repeats=3) / 1e6
        pinned_copy = what.endswith("pinned")
        session.add(
            f"copy {what}", f"{speed:.1f} GB/s",
            expected=f">= {PINNED_GB_PER_SECOND:.0f} GB/s" if pinned_copy else "",
            verdict=session.target(speed >= PINNED_GB_PER_SECOND) if pinned_copy else "measured",
            gb_per_second=speed,
        )  # fmt: skip
