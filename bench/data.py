#!/usr/bin/env python3
"""Measure speed and memory of tokenizing text and of making batches.

    tokenize    tokens/s of megatron-moe tokenize beside the tokenizer alone, 1 and N processes
    memory      peak memory of megatron-moe tokenize on 10 MB, 100 MB and 1 GB of the same text
    loader      tokens/s of the batches of seven domains, one rank, and milliseconds a step

Writes bench/results/data.json. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one core, for both sides alike

from megatron_moe.runtime import cpu

cpu.install()

from harness import held_together

from megatron_moe.config.load import build
from megatron_moe.config.mixtures import PRESETS, SLIMPAJAMA
from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import start_blend
from megatron_moe.data.corpus import tokenize_files
from megatron_moe.data.feed import DataRank, Feed
from megatron_moe.data.samples import Samples
from megatron_moe.data.stream import TokenStream
from megatron_moe.data.texts import Texts
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.data.tokens import prepare_tokens

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "data.json"
SEQ_LENGTH, BATCH = 4096, 64
PROSE = ("books", "wikipedia", "stackexchange")
"""Domains of the tokenizer's benchmark: 20 MB, so that N workers end at about the same time."""


def main() -> None:
    """Measure what is asked for and put it into the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenize", "memory", "loader"])
    parser.add_argument("--domains", type=Path, default=ROOT / "runs" / "domains",
                        help="folder of tools/get_domains.py")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "runs/models/smollm2-135m")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measured = globals()[args.what](args.domains, args.tokenizer, Path(scratch))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    results[args.what] = {"date": date.today().isoformat(), "machine": machine, **measured}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results[args.what], indent=2))


def tokenize(domains: Path, tokenizer_folder: Path, scratch: Path) -> dict[str, Any]:
    """The best of three of each, in turns, so that a busy moment does not decide."""
    tokenizer = load_tokenizer(tokenizer_folder)
    files = [domains / f"{name}.jsonl" for name in PROSE]
    texts = [json.loads(line)["text"] for file in files for line in file.open()]
    cores = os.cpu_count() or 1
    seconds: dict[str, list[float]] = {}
    tokens = 0
    for turn in range(3):
        for workers in (1, cores):
            alone = seconds.setdefault(f"tokenizer alone, {workers} processes", [])
            alone.append(_seconds(lambda n=workers: _alone(tokenizer_folder, texts, n)))
            ours = seconds.setdefault(f"megatron-moe tokenize, {workers} workers", [])
            out = scratch / f"out-{turn}-{workers}"
            report = tokenize_files(files, out, tokenizer, workers=workers)
            ours.append(report.seconds)
            tokens = report.counts.tokens
    speeds = {name: round(tokens / min(result)) for name, result in seconds.items()}
    megabytes = sum(map(len, texts)) / 1e6
    return {"megabytes": round(megabytes, 1), "tokens": tokens, "tokens_per_second": speeds}


def _alone(folder: Path, texts: list[str], processes: int) -> None:
    if processes == 1:
        _encode(folder, texts)
        return
    share = -(-len(texts) // (8 * processes))
    parts = [texts[i : i + share] for i in range(0, len(texts), share)]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        list(pool.map(_encode, [folder] * len(parts), parts))


_loaded: dict[Path, Any] = {}


def _encode(folder: Path, texts: list[str]) -> None:
    """Run the tokenizer alone: batches of texts in, nothing kept."""
    tokenizer = _loaded.setdefault(folder, None) or load_tokenizer(folder)
    _loaded[folder] = tokenizer
    for start in range(0, len(texts), 100):
        tokenizer.encode_batch(texts[start : start + 100])


def memory(domains: Path, tokenizer_folder: Path, scratch: Path) -> dict[str, Any]:
    """Peak of the proportional set size of all processes of the command, with 2 workers.

    Words split at spaces stand in for the tokenizer, which is none of the file's business: so the
    gigabyte takes a minute.
    """
    del tokenizer_folder
    lines = (domains / "wikipedia.jsonl").read_text().splitlines(keepends=True)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(scratch / "words")
    peaks = {}
    for megabytes in (10, 100, 1000):
        text = scratch / f"{megabytes}.jsonl"
        with text.open("w") as file:
            while file.tell() < megabytes * 1e6:
                file.writelines(lines)
        out = scratch / f"out-{megabytes}"
        command = [sys.executable, "-m", "megatron_moe", "tokenize", str(text), "--out", str(out)]
        peaks[f"{megabytes} MB"] = _peak([*command, "--tokenizer", str(scratch / "words"),
                                          "--workers", "2"])  # fmt: skip
        text.unlink()
    return {"peak_mib": peaks}


def _peak(command: list[str]) -> float:
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, held_together(process))
        time.sleep(0.1)
    assert process.returncode == 0
    return round(peak / 2**20, 1)


def loader(domains: Path, tokenizer_folder: Path, scratch: Path) -> dict[str, Any]:
    """The batches of one rank that takes the whole global batch: 64 sequences of 4096 tokens."""
    tokenizer = load_tokenizer(tokenizer_folder)
    training = {}
    for name in SLIMPAJAMA:
        prefix = prepare_tokens(
            domains / f"{name}.jsonl",
            dense_folder=tokenizer_folder,
            vocab_size=tokenizer.vocab_size,
            cache_dir=ROOT / "runs" / "mixing" / "tokens",
        )
        stream = TokenStream(prefix, vocab_size=tokenizer.vocab_size)
        training[name] = Samples(stream, seq_length=SEQ_LENGTH, seed=0)
    config = build(RunConfig, {
        "run": {"dir": str(scratch)}, "source": {"path": "dense"}, "moe": {"num_moe_experts": 8},
        "data": {"path": "text", "seq_length": SEQ_LENGTH},
        "train": {"steps": 1, "global_batch_size": BATCH},
    })  # fmt: skip
    data_rank = DataRank(dp_rank=0, dp_size=1, cp_rank=0, cp_size=1)
    feed = Feed(Texts(training, {}, None, []), config, data_rank)
    blend, seconds = start_blend(PRESETS["sheared"]), []
    for _ in range(60):
        _, blend = feed.next_step(blend)
        seconds.append(feed.seconds)
    median = statistics.median(seconds)
    return {
        "sequences": BATCH,
        "seq_length": SEQ_LENGTH,
        "milliseconds_per_step": round(median * 1000, 2),
        "microseconds_per_sequence": round(median / BATCH * 1e6),
        "tokens_per_second": round(BATCH * SEQ_LENGTH / median),
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
