"""Compare Muon with AdamW in continuing the pre-training of a small upcycled model.

A small Llama is trained with AdamW on every second file of Python's standard library and upcycled
to 8 copies, top-2. Each optimizer then trains on the other files with several learning rates: the
same tokens, in the same order. Minutes on 2 cores; prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

from megatron_moe.data.corpus import tokenize_files
from megatron_moe.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from research.study.cases import Case  # noqa: E402
from research.study.inputs import dense_of_one_expert, random_dense, train_tokenizer  # noqa: E402
from research.study.runs import Training, dense_run, settings, train_case, train_run  # noqa: E402

RATES = (3e-4, 1e-3, 3e-3)
DENSE, CONTINUE_STEPS, WARMUP = Training(steps=300, lr=3e-3, warmup_steps=20), 60, 6
DOMAIN = "text"


def main() -> None:
    """Create the inputs once, train every case that has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for inputs, runs and results")
    out: Path = parser.parse_args().out
    dense = prepare(out)
    for optimizer in ("adam", "muon"):
        for rate in RATES:
            result = out / f"{optimizer}-{rate:g}.json"
            if not result.exists():
                train_case(
                    continued(out, dense, optimizer, rate), result,
                    about={"optimizer": optimizer, "lr": rate},
                )  # fmt: skip
            values = json.loads(result.read_text())
            print(f"{optimizer:5} lr {rate:g}: {values['validation']}")


def prepare(out: Path) -> Path:
    """Write texts, a tokenizer and tokens, and return the trained dense model."""
    dense = out / "dense"
    if dense.exists():
        return dense
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for part, chosen in (("pretrain", files[::2]), ("continue", files[1::2])):
        path = out / part / f"{DOMAIN}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [file.read_text(encoding="utf-8") for file in chosen]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(out / "pretrain", out / "tokenizer")
    for part in ("pretrain", "continue"):
        (out / f"{part}-tokens").mkdir(exist_ok=True)
        tokenize_files(
            [out / part / f"{DOMAIN}.jsonl"], out / f"{part}-tokens" / DOMAIN,
            load_tokenizer(out / "tokenizer"),
        )  # fmt: skip
    random_dense(out / "tokenizer", out / "random", seed=0)
    run = out / "dense-run"
    train_run(dense_run(run, out / "random", out / "pretrain-tokens", DENSE, domains=[DOMAIN]))
    dense_of_one_expert(run, out / "random", dense)
    return dense


def continued(out: Path, dense: Path, optimizer: str, rate: float) -> dict[str, Any]:
    """Return the configuration of one case."""
    how = Training(steps=CONTINUE_STEPS, lr=rate, warmup_steps=WARMUP)
    case = Case("copy", "whole", {"method": "copy"})
    tree = settings(
        case, out / f"run-{optimizer}-{rate:g}", dense, out / "continue-tokens", how, seed=0,
        domains=[DOMAIN],
    )  # fmt: skip
    tree["optimizer"]["optimizer"] = optimizer
    return tree


if __name__ == "__main__":
    main()
