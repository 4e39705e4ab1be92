"""Every command of README.md and docs/tutorial.md runs as it is typed there.

In `make test` the dense model and the text are tiny ones, at the paths where the documented
commands put the real ones. Marked slow, the commands run on the real ones. What needs GPUs is
planned and built without them: `plan` and `train --dry-run` on the same configuration.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import run_command
from dense_models import DENSE_MODELS
from test_docs import BLOCK
from tiny import TOKENIZER_SIZE, save_dense, save_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tutorial.md")
GPUS_PER_NODE = 8

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (Path(sys.prefix) / "bin" / "megatron-moe").exists(),
        reason="this environment has no megatron-moe command",
    ),
]


def documented(page: str) -> list[list[str]]:
    """The command lines of a page's bash blocks, in order, as words."""
    blocks = BLOCK.findall((ROOT / page).read_text())
    lines = [line for language, text in blocks if language == "bash" for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_gpus(words: list[str]) -> Iterator[list[str]]:
    """What can be run here of a command: itself, or what prepares it on a machine with GPUs."""
    program = Path(words[0]).name
    if program == "local.sh":
        yield ["megatron-moe", "train", *words[1:], "--dry-run", "--world-size", str(GPUS_PER_NODE)]
    elif program == "sbatch":
        gpus = str(int(words[words.index("--nodes") + 1]) * GPUS_PER_NODE)
        script = words.index("launch/slurm.sbatch")
        yield ["megatron-moe", "plan", words[script + 1], "--check", "--gpus", gpus]
        yield ["megatron-moe", "train", *words[script + 1 :], "--dry-run", "--world-size", gpus]
    else:
        yield words


def downloads(words: list[str]) -> bool:
    return words[0] == "make" or "tools/get_dense.py" in words or "tools/get_text.py" in words


def from_the_hub(words: list[str]) -> bool:
    return "--from" in words


def runs_the_tests(words: list[str]) -> bool:
    return words == ["make", "test"]


class Clone:
    """The files of the repository as they are, in a folder without earlier runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(sys.prefix)

    def run(self, words: list[str]) -> str:
        """Run a command, which must succeed. Returns what it printed."""
        if words[0] == "make":  # the environment is complete: do not install into it
            words = ["make", "--old-file=.venv/.installed", *words[1:]]
        path = f"{self.folder / '.venv/bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            words, cwd=self.folder, env=os.environ | {"PATH": path, "PYTHONPATH": str(self.folder)},
            capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        return self.checked(words, done)

    def run_in_a_fork(self, words: list[str]) -> str:
        """Do the same in a fork of this process: what imports torch takes seconds to start."""
        if words[:1] != ["megatron-moe"] or words[1] == "plan":
            return self.run(words)
        return self.checked(words, run_command(*words[1:], cwd=self.folder, timeout=600))

    def checked(self, words: list[str], done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    clone = Clone(tmp_path)
    for name, shape in DENSE_MODELS.items():  # of the models with GPUs, what plan and dry-run read
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(shape))
    return clone


def put_tiny_model_and_text(root: Path) -> None:
    """Make what get_dense.py and get_text.py would download: our own pages are the text."""
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    pages = sorted((ROOT / "docs").glob("*.md"))
    text = [paragraph for page in pages for paragraph in page.read_text().split("\n\n")]
    dense = save_dense(root / config["source"]["path"], vocab_size=TOKENIZER_SIZE)
    save_tokenizer(dense, pages)
    train, validation = (root / config["data"][key] for key in ("path", "validation_path"))
    train.parent.mkdir(parents=True)
    train.write_text("".join(json.dumps({"text": one}) + "\n" for one in text[::2]))
    validation.write_text("".join(json.dumps({"text": one}) + "\n" for one in text[1::2]))


def test_all_commands_run_on_a_tiny_model(clone: Clone):
    """A command on both pages runs once; `make` and downloads are left to the slow test."""
    put_tiny_model_and_text(clone.folder)
    ran: list[list[str]] = []
    for words in (words for page in PAGES for words in documented(page)):
        words[0] = words[0].removeprefix(".venv/bin/")
        if downloads(words) or words in ran:
            continue
        ran.append(words)
        for command in without_gpus(words):
            clone.run_in_a_fork(command)
    commands = {words[1] for words in ran if words[0] == "megatron-moe"}
    assert commands >= {"train", "evaluate", "analyze", "report", "generate", "export", "plan"}
    assert {words[0] for words in ran} >= {"launch/local.sh", "sbatch"}
    for name in ("report.html", "hf/config.json", "metrics.jsonl"):
        assert (clone.folder / "runs/demo" / name).is_file()


@pytest.mark.slow  # and not network, which make test runs although it is slow: this takes an hour
@pytest.mark.parametrize("page", PAGES)
def test_all_commands_of_a_page_run_as_typed(clone: Clone, page: str):
    """In order, from an empty folder, on real weights and text."""
    for words in documented(page):
        if from_the_hub(words) or runs_the_tests(words):
            continue  # a gated model, and these tests
        for command in without_gpus(words):
            clone.run(command)
