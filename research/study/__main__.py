"""Compare construction methods on small models; write docs/study.json, docs/study.md and plots.

    text --> a small dense model, pre-trained --> every method, 3 seeds, the same tokens each
    SmolLM2-135M --> every method and rescale, evaluated before the first step

It takes about an hour on 2 cores, with two runs at a time; after an interruption, run the same
command to resume. Each run writes a small file to runs/study/results, from which docs/ is written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Two runs at a time, with one thread each; a process that forks must not have started threads.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from megatron_moe.runtime import cpu  # noqa: E402

cpu.install()  # before Megatron-Core is imported

import torch  # noqa: E402
from get_dense import get_dense  # noqa: E402
from get_domains import get_domains  # noqa: E402
from package_index import default_cache  # noqa: E402

from megatron_moe.config.mixtures import SLIMPAJAMA  # noqa: E402
from megatron_moe.errors import UserError  # noqa: E402
from research.study import inputs, runs, step0  # noqa: E402
from research.study.cases import AT_STEP_0, DENSE, FIRST, TRAINED, Case  # noqa: E402
from research.study.jobs import Job, do_all  # noqa: E402
from research.study.page import gathered, write_pages  # noqa: E402

BELOW = ROOT / "runs"
HERE = BELOW / "study"
DOMAINS, SMOLLM2 = BELOW / "domains", BELOW / "models" / "smollm2-135m"
TEXTS, TOKENS, MODELS, RESULTS = (HERE / p for p in ("texts", "tokens", "models", "results"))
DENSE_MODEL = MODELS / "dense"
BRANCHES = {
    "prose": ("commoncrawl", "c4", "wikipedia", "books"),
    "technical": ("github", "arxiv", "stackexchange"),
}
"""Branch-Train-MiX: domains on which separate copies of the dense model are trained."""
SEEDS = (0, 1, 2)


def main() -> None:
    """Run all jobs without a result, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="output folder of the pages"
    )
    parser.add_argument("--minutes", type=float, help="start no job after this many minutes")
    parser.add_argument("--pages", action="store_true", help="only write the pages")
    args = parser.parse_args()
    torch.set_num_threads(1)
    until = None if args.minutes is None else time.time() + 60 * args.minutes
    try:
        if not args.pages:
            prepare()
            do_all(jobs(), workers=2, logs=HERE / "logs", until=until)
        judged_on = len(SLIMPAJAMA) * runs.HELD_OUT * runs.SEQ_LENGTH
        write_pages(gathered(RESULTS, held_out_tokens=judged_on), args.out)
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def prepare() -> None:
    """Get text and weights, in forked processes, because this process must not start threads."""
    cache, logs = default_cache(), HERE / "logs"
    steps = (
        [
            Job("domains", DOMAINS, partial(get_domains, DOMAINS, local=None, cache=cache)),
            Job("smollm2", SMOLLM2, partial(get_dense, SMOLLM2, source=None, cache=cache)),
        ],
        [Job("texts", TEXTS, partial(inputs.write_texts, DOMAINS, TEXTS))],
        [
            *(_tokens_job(part, TEXTS / "tokenizer") for part in ("pretrain", "continue")),
            _tokens_job("probe", SMOLLM2),
            *(_random_job(seed) for seed in SEEDS),
        ],
    )
    for step in steps:
        do_all(step, workers=2, logs=logs)


def _tokens_job(part: str, tokenizer: Path) -> Job:
    out = TOKENS / part
    return Job(f"tokens-{part}", out, partial(inputs.write_tokens, TEXTS, part, tokenizer, out))


def _random_job(seed: int) -> Job:
    out = MODELS / f"random-{seed}"
    work = partial(inputs.random_dense, TEXTS / "tokenizer", out, seed=seed)
    return Job(out.name, out, work)


def jobs() -> list[Job]:
    """Return all training and evaluation jobs, in order of preference."""
    papers, others = (
        [
            _trained_job(case, seed)
            for seed in SEEDS
            for case in TRAINED
            if (case.name in FIRST) == of_papers
        ]
        for of_papers in (True, False)
    )
    at_step_0 = [_measure_job(), *(_judged_job(case) for case in AT_STEP_0)]
    branches = [_branch_job(name) for name in BRANCHES]
    return [_dense_job(), *papers, *at_step_0, *branches, *others]


def _dense_job() -> Job:
    def work() -> None:
        run = HERE / "runs" / "dense"
        tree = runs.dense_run(run, MODELS / "random-0", TOKENS / "pretrain", runs.PRETRAIN)
        runs.train_run(tree)
        inputs.dense_of_one_expert(run, MODELS / "random-0", DENSE_MODEL)
        runs.write_result(RESULTS / "dense.json", runs.collect(run / "metrics.jsonl"))

    return Job("dense", RESULTS / "dense.json", work)


def _branch_job(name: str) -> Job:
    out = MODELS / name

    def work() -> None:
        run = HERE / "runs" / name
        tree = runs.dense_run(run, DENSE_MODEL, TOKENS / "pretrain", runs.CONTINUE, BRANCHES[name])
        runs.train_run(tree)
        inputs.dense_of_one_expert(run, DENSE_MODEL, out)

    return Job(f"branch-{name}", out, work, needs=(RESULTS / "dense.json",))


def _trained_job(case: Case, seed: int) -> Job:
    name = f"{case.file_name}-seed{seed}"
    result = RESULTS / "trained" / f"{name}.json"
    random = MODELS / f"random-{seed}"
    dense = DENSE_MODEL if case.start == "trained" else random
    sources = [MODELS / branch for branch in BRANCHES] if case.name == "mix" else []

    def work() -> None:
        first, *others = sources or [dense]
        tree = runs.settings(
            case, HERE / "runs" / name, first, TOKENS / "continue", runs.CONTINUE, seed=seed,
            mix_with=others,
        )  # fmt: skip
        about = {"case": case.name, "shape": case.shape, "seed": seed}
        runs.train_case(tree, result, about=about)

    return Job(f"train-{name}", result, work, needs=(RESULTS / "dense.json", *sources))


MEASURED = HERE / "measured"


def _measure_job() -> Job:
    def work() -> None:
        parts = next(case for case in AT_STEP_0 if case.shape == "parts")
        config = step0.config_of(parts, HERE / "runs" / "measure", SMOLLM2, TOKENS / "probe")
        step0.measure(config, MEASURED)

    return Job("measure-smollm2", MEASURED, work)


def _judged_job(case: Case) -> Job:
    result = RESULTS / "step0" / f"{case.file_name}.json"

    def work() -> None:
        run = HERE / "runs" / f"step0-{case.file_name}"
        config = step0.config_of(case, run, SMOLLM2, TOKENS / "probe")
        step0.judge(case, config, MEASURED, result)

    whole = case is DENSE or not (case.measured or case.upcycle["method"] == "split_clustered")
    return Job(f"step0-{case.file_name}", result, work, needs=() if whole else (MEASURED,))


if __name__ == "__main__":
    main()
