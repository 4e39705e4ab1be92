"""README and CONTRIBUTING say nothing that is not so: commands, settings, files, names."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml
from dense_models import DENSE_MODELS

from megatron_moe.cli.main import app
from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.rules.check import violations

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
PAGES = (
    "README.md", "CONTRIBUTING.md", "docs/data.md", "docs/evaluation.md", "docs/export.md",
    "docs/gpu.md", "docs/index.md", "docs/install.md", "docs/parallelism.md", "docs/training.md",
    "docs/troubleshooting.md", "docs/tutorial.md", "docs/upcycling.md",
)  # fmt: skip
TRAINING = (ROOT / "docs/training.md").read_text()
UPCYCLING = (ROOT / "docs/upcycling.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command line of the pages' bash blocks, as words."""
    blocks = [
        body
        for page in PAGES
        for language, body in BLOCK.findall((ROOT / page).read_text())
        if language == "bash"
    ]
    return [words for body in blocks for line in body.splitlines() if (words := _words(line))]


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_the_example_is_a_configuration(tmp_path):
    """The first example is complete; the settings of the others can be added to it."""
    example, *others = [body for language, body in BLOCK.findall(TRAINING) if language == "yaml"]
    path = tmp_path / "example.yaml"
    path.write_text(example)
    config = load(RunConfig, path)
    assert set(yaml.safe_load(example)) <= set(type(config).model_fields)
    assert config.parallel.expert_parallel_size == 4
    for other in others:
        tree = yaml.safe_load(example)
        for section, settings in yaml.safe_load(other).items():
            tree[section] = {**tree.get(section, {}), **settings}
        path.write_text(yaml.safe_dump(tree))
        assert (
            violations(load(RunConfig, path), spec_from_config(DENSE_MODELS["Llama-3.2-3B"]), 8)
            == []
        )


def test_there_are_commands():
    assert {Path(words[0]).name for words in commands()} >= {
        "make",
        "megatron-moe",
        "sbatch",
        "local.sh",
    }


def harness_options() -> set[str]:
    """What `lm-eval run` takes."""
    from lm_eval._cli.run import Run

    subparsers = argparse.ArgumentParser().add_subparsers()
    Run.create(subparsers)
    return set(subparsers.choices["run"]._option_string_actions)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_what_exists(words):
    program = Path(words[0]).name
    if program == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif program == "docker":
        assert words[1] in ("build", "run")
        return
    elif words[1:] == ["--version"]:
        return
    elif program == "megatron-moe":
        known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        assert words[1] in known
        options = {option for parameter in known[words[1]].params for option in parameter.opts}
        if "--tasks" in words:
            options |= harness_options()
        assert {word for word in words if word.startswith("--")} <= options
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert any((ROOT / word).is_file() for word in words), words
    for before, word in pairwise(words):
        if word.startswith(("configs/", "launch/", "tools/")):
            assert (ROOT / word).is_file(), word
        if re.fullmatch(r"[a-z_.]+=\S+", word) and before != "--set":
            section, field = word.partition("=")[0].split(".")
            assert field in RunConfig.model_fields[section].annotation.model_fields  # type: ignore


def test_generated_pages_are_current():
    """If this fails: python tools/write_reference.py."""
    import write_reference

    assert write_reference.MODELS.read_text() == write_reference.models_page()
    assert write_reference.SETTINGS.read_text() == write_reference.settings_page()
    assert write_reference.ARCHITECTURE.read_text() == write_reference.architecture_page()
    folders = {path.parent.name for path in (ROOT / "megatron_moe").glob("*/__init__.py")}
    assert folders == set(write_reference.FOLDERS) - {""}


def build_site(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(tmp_path):
    done = build_site(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "settings" / "index.html").exists()


def test_a_broken_link_stops_the_site(tmp_path):
    """Without --quiet: with it, mkdocs 1.6 drops the warnings that --strict counts."""
    for name in ("docs", "megatron_moe", "mkdocs.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "export.md").open("a") as page:
        page.write("\n[a broken link](nowhere.md)\n")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "'nowhere.md', but the target is not found" in done.stderr
    assert "Aborted with 1 warnings in strict mode" in done.stdout


ROWS = re.findall(
    r"^\| [^|]+ \| `(megatron_moe/\S+)\.py` \| `([\w.]+)` \|", UPCYCLING, re.MULTILINE
)


def test_the_followed_tensor_has_rows():
    assert len(ROWS) >= 8


@pytest.mark.parametrize(("module", "function"), ROWS)
def test_a_stage_of_the_followed_tensor_is_a_function(module, function):
    result = importlib.import_module(module.replace("/", "."))
    for name in function.split("."):
        result = getattr(result, name)
    assert callable(result)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"\b(TODO|TBD|FIXME|DEMO_\w+)\b", (ROOT / page).read_text())


def messages() -> str:
    """All texts of the package, with a mark where an f-string puts a value."""
    texts = []
    for path in (ROOT / "megatron_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                texts.append("".join(p if isinstance(p, str) else "..." for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_exist():
    """Of each quoted beginning, the pieces between values must be texts of the package."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    assert len(rows) >= 10
    known = messages()
    for quoted in (text for row in rows for text in re.findall(r"`([^`]+)`", row)):
        for piece in re.split(r"\.\.\.|\bN\b|; |\([^)]*\)", quoted):
            assert piece.strip() in known, (quoted, piece)


def test_the_published_recipes_have_settings():
    """Each paper of the table has a block, which the test of the examples loads and checks."""
    papers = ("2412.09952", "2406.16554", "2410.07524", "2502.19261")
    blocks = [body for language, body in BLOCK.findall(TRAINING) if language == "yaml"]
    for paper in papers:
        assert f"arXiv {paper}" in TRAINING
        (block,) = [body for body in blocks if body.startswith(f"# {paper}")]
        assert {"moe", "upcycle", "optimizer"} <= set(yaml.safe_load(block))
