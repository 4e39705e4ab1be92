"""Compare a resumed run with its checkpoint: which settings and texts changed, and what follows.

A run can be resumed with other settings, but not with a model that computes something else. Every
difference is shown in a table in the log, and in run.dir/resumed.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.folder import keep_source_files, newest, source_copy
from megatron_moe.config.load import leaves
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.disk import write_text
from megatron_moe.json_text import parse_json

_TEXTS_FILE = "texts.json"

_REFUSED = {
    "optimizer.optimizer": "the checkpoint holds the state of the other optimizer",
    "lora.rank": "the checkpoint has adapters of another rank, or none",
    "lora.alpha": "the trained adapters would have another factor",
    "lora.targets": "the checkpoint has adapters of other parts",
    "moe.moe_router_topk": "the trained experts and router would compute something else",
    "moe.router_order": "the trained experts and router would compute something else",
    "moe.moe_router_score_function": "the trained router would compute something else",
    "moe.router_gate": "the trained router has other weights",
    "moe.num_moe_experts": "the trained layers have other experts",
    "moe.moe_ffn_hidden_size": "the trained experts have another size",
    "moe.moe_layers": "other layers were trained as MoE layers",
    "moe.first_dense_layers": "other layers were trained as MoE layers",
    "moe.last_dense_layers": "other layers were trained as MoE layers",
    "moe.moe_shared_expert_intermediate_size": "the trained shared expert has another size",
    "moe.moe_shared_expert_gate": "the trained shared expert has or lacks a gate",
}
"""Settings that the trained weights depend on, with the reason."""
_REFUSED_AS = dict.fromkeys(_REFUSED, "refused")
_EFFECTS = {
    "run.dir": "takes effect: the run was moved",
    "run.seed": "takes effect: the text is shuffled anew, so some of it is read again",
    "run.": "takes effect",
    "source.": "no effect: the weights come from the checkpoint",
    "upcycle.": "no effect: the experts are built already",
    "data.seq_length": "takes effect: the text is cut anew, so some of it is read again",
    "data.path": "takes effect: training continues on this text",
    "data.domains": "takes effect: training continues on these texts",
    "train.freeze": "takes effect: parameters that were frozen start with empty optimizer state",
    "train.stages": "takes effect: parameters that were frozen start with empty optimizer state",
    "train.steps": "takes effect: the learning rate follows the schedule of the new length, unless "
    "optimizer.lr_decay_steps is set",
}
"""Effect of other settings; the longest prefix counts, and the default is ``takes effect``."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a checkpoint and the run that resumes it."""

    name: str
    before: Any
    now: Any
    effect: str


def with_source(config: RunConfig) -> RunConfig:
    """Return the configuration of a run that may resume, with a source folder that exists.

    A checkpoint holds everything that a resume needs of the source, so the folder may be gone.
    """
    if (config.source.path / "config.json").exists():
        return config
    checkpoint = newest(config.run.dir)
    if checkpoint is None:
        return config
    folder = config.run.dir / "source"
    if not (folder / "config.json").exists():  # other ranks may be reading it
        folder = keep_source_files(config.run.dir, source_copy(checkpoint))
    return config.model_copy(update={"source": config.source.model_copy(update={"path": folder})})


def changed_settings(before: RunConfig, now: RunConfig, *, step: int) -> list[Change]:
    """Return the settings that differ from the checkpoint's of ``step``, in order.

    Raises:
        ConfigError: A change would make the model compute something else.
    """
    old, new = (dict(leaves(c.model_dump(mode="json"))) for c in (before, now))
    names = list(dict.fromkeys([*new, *old]))
    changes = [
        Change(name, old.get(name), new.get(name), _REFUSED_AS.get(name) or _effect(name))
        for name in names
        if old.get(name) != new.get(name)
    ]
    if refused := [change for change in changes if change.name in _REFUSED]:
        lines = [f"{c.name} ({c.now}) was {c.before}: {_REFUSED[c.name]}" for c in refused]
        others = len(changes) > len(refused)
        raise ConfigError(
            "the run cannot be resumed with other values of these settings:\n  "
            + "\n  ".join(lines)
            + "\n  set them as before, or start a new run in another run.dir"
            + (f"\n{change_table(changes, step=step)}" if others else "")
        )
    return changes


def changed_texts(run_dir: Path, fingerprints: Mapping[str, str]) -> list[Change]:
    """Compare the texts with those of the job before, and remember them for the next one.

    Args:
        run_dir: Folder of the run.
        fingerprints: Hash of each domain's tokens.
    """
    path = run_dir / _TEXTS_FILE
    before: dict[str, str] = {}
    # Version 0.1 could leave half a file; only a remark in the log depends on it.
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = parse_json(path.read_text(encoding="utf-8"))
    changes = [
        Change(f"tokens of {name}", before[name], now, "takes effect: the content has changed")
        for name, now in fingerprints.items()
        if name in before and before[name] != now
    ]
    write_text(path, json.dumps(dict(fingerprints), indent=2) + "\n")
    return changes


def change_table(changes: list[Change], *, step: int) -> str:
    """Format the changes for the log."""
    if not changes:
        return "No setting has changed since the checkpoint"
    rows = [("setting", "checkpoint", "now", "effect")]
    rows += [(c.name, str(c.before), str(c.now), c.effect) for c in changes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)) + f"  {row[3]}"
             for row in rows]  # fmt: skip
    return f"Changed since the checkpoint of step {step}:\n  " + "\n  ".join(lines)


def record_changes(run_dir: Path, changes: list[Change], *, step: int) -> None:
    """Append the changes to run.dir/resumed.jsonl."""
    record = {
        "step": step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "changes": [{"name": c.name, "before": c.before, "now": c.now, "effect": c.effect}
                    for c in changes],
    }  # fmt: skip
    with (run_dir / "resumed.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _effect(name: str) -> str:
    matches = [prefix for prefix in _EFFECTS if name.startswith(prefix)]
    return _EFFECTS[max(matches, key=len)] if matches else "takes effect"
