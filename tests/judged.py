"""A run of two domains of real text: a tiny model, trained two large steps, with its tokenizer."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tiny import save_dense, save_tokenizer
from training_runs import run_training, tree

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SEQ_LENGTH = 64
SAMPLES = 3


@dataclass(frozen=True)
class Judged:
    run: Path
    dense: Path
    text: Path
    """Of one domain, as a file."""
    texts: dict[str, list[str]]
    """Held-out documents of each domain."""


def documents(name: str, *, size: int) -> list[str]:
    text = (STDLIB / name).read_text(encoding="utf-8")
    return [f"caf\u00e9 \u6f22\u5b57 {text[i : i + size]}" for i in range(0, 20 * size, size)]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make_judged(root: Path) -> Judged:
    """Write texts, model and tokenizer to ``root`` and train there."""
    dense = save_dense(root / "dense", num_hidden_layers=2, vocab_size=600)
    save_tokenizer(dense, [STDLIB / "argparse.py", STDLIB / "ast.py"])
    texts = {"code": documents("argparse.py", size=150), "more": documents("ast.py", size=260)}
    domains = {
        name: {
            "path": write(root / f"{name}.jsonl", result[10:]),
            "validation_path": write(root / f"{name}-held-out.jsonl", result[:10]),
            "weight": 0.5,
        }
        for name, result in texts.items()
    }
    settings = tree(
        root / "run", dense, root,
        train={"steps": 2, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 0},
    )  # fmt: skip
    settings["data"] = {
        "domains": domains, "seq_length": SEQ_LENGTH, "validation_samples": SAMPLES
    }  # fmt: skip
    run_training(settings, world_size=1)
    return Judged(
        root / "run",
        dense,
        root / "code.jsonl",
        {name: result[:10] for name, result in texts.items()},
    )
