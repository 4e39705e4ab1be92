"""Rows 7, 8, 9, 24, 37: YAML says what the user meant, or an error says where it does not."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.load import dump, load
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError

BASE = """\
run: {dir: runs/x}
source: {path: models/tiny}
moe: {num_moe_experts: 8}
train: {steps: 10}
"""
DOMAINS = "data: {{domains: {{{}: {{path: a, weight: 0.5}}, other: {{path: b, weight: 0.5}}}}}}\n"


def loaded(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    text += "" if "data:" in text else "data: {path: x}\n"
    (tmp_path / "run.yaml").write_text(text)
    return load(RunConfig, tmp_path / "run.yaml", overrides)


def test_aliases_cannot_multiply(tmp_path: Path):
    lines = ["a: &a [x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 20)}]" for a, b in pairwise("abcdefgh")]
    with pytest.raises(ConfigError, match="more than 100,000 values, aliases"):
        loaded(tmp_path, BASE + "\n".join(lines) + "\n")


def test_an_alias_is_read(tmp_path: Path):
    text = BASE.replace("{dir: runs/x}", "&run {dir: runs/x}") + "data: {path: x}\n"
    assert loaded(tmp_path, text).run.dir == Path("runs/x")


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "9" * 5000, "{" * 3000])
def test_text_that_breaks_parsers(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        loaded(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (BASE + "train: {steps: 20}\n", (4, 5)),
        (BASE + "optimizer:\n  lr: 1e-3\n  min_lr: 1e-4\n  lr: 1e-2\n", (6, 8)),
        (BASE + "data:\n  domains:\n    a: {path: x}\n    a: {path: y}\n", (7, 8)),
    ],
)
def test_a_name_that_stands_twice(tmp_path: Path, text: str, lines: tuple[int, int]):
    with pytest.raises(ConfigError, match=f"twice, in line {lines[0]} and in line {lines[1]}"):
        loaded(tmp_path, text)


def test_a_merged_mapping_may_be_overridden(tmp_path: Path):
    text = BASE + "data:\n  domains:\n    a: &a {path: x, weight: 0.5}\n    b: {<<: *a, path: y}\n"
    domains = loaded(tmp_path, text).data.domains
    assert domains is not None
    assert (domains["b"].path, domains["b"].weight) == (Path("y"), 0.5)


@pytest.mark.parametrize("name", ["no", "on", "yes", "off", "null", "~", "1", "2024-01-01", "1e3"])
def test_names_stay_as_written(tmp_path: Path, name: str):
    config = loaded(tmp_path, BASE + DOMAINS.format(name))
    assert list(config.data.domains or {}) == [name, "other"]
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "again.yaml") == config


PATHS: dict[str, Any] = {
    "run.dir": lambda c: c.run.dir,
    "source.path": lambda c: c.source.path,
    "data.path": lambda c: c.data.path,
    "data.validation_path": lambda c: c.data.validation_path,
    "upcycle.plan": lambda c: c.upcycle.plan,
    "data.mixing.reference_losses": lambda c: c.data.mixing.reference_losses,
}


@pytest.mark.parametrize("setting", PATHS)
def test_home_is_expanded_in_every_path(tmp_path: Path, setting: str):
    config = loaded(tmp_path, BASE, f"{setting}=~/runs/x")
    assert PATHS[setting](config) == Path(os.path.expanduser("~/runs/x"))


def test_home_is_expanded_in_lists_and_domains(tmp_path: Path):
    text = BASE + "upcycle: {mix_with: [~/a, /b]}\ndata: {domains: {x: {path: ~/c}}}\n"
    config = loaded(tmp_path, text)
    assert config.upcycle.mix_with == [Path.home() / "a", Path("/b")]
    assert config.data.domains is not None
    assert config.data.domains["x"].path == Path.home() / "c"


def test_an_unknown_home_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.dir is '~nobody-here/x', must be .*home"):
        loaded(tmp_path, BASE, "run.dir=~nobody-here/x")


@pytest.mark.parametrize("section", ["parallel", "optimizer", "upcycle", "log"])
def test_an_empty_section_has_its_defaults(tmp_path: Path, section: str):
    config = loaded(tmp_path, BASE + f"{section}:\n  # all lines are commented out\n")
    assert getattr(config, section) == getattr(loaded(tmp_path, BASE), section)
    overridden = loaded(tmp_path, BASE + "parallel:\n", "parallel.expert_parallel_size=2")
    assert overridden.parallel.expert_parallel_size == 2


def test_an_empty_section_within_a_section(tmp_path: Path):
    assert loaded(tmp_path, BASE + "data:\n  path: x\n  mixing:\n").data.mixing.weights == "given"


def test_a_section_that_must_be_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="source must be set"):
        loaded(tmp_path, BASE.replace("{path: models/tiny}", ""))


@pytest.mark.parametrize("text", ["2024-01-01", "12:30", "2024-01-01 10:00:00", "010_run", "1.2.3"])
def test_dates_and_times_are_text(tmp_path: Path, text: str):
    assert loaded(tmp_path, BASE, f"run.dir={text}").run.dir == Path(text)


@pytest.mark.parametrize(
    ("override", "value"),
    [("optimizer.lr=3e-4", 3e-4), ("optimizer.lr=1.5E-3", 1.5e-3), ("optimizer.lr=.5", 0.5),
     ("optimizer.lr=1", 1.0), ("optimizer.lr=1_0.5", 10.5)],
)  # fmt: skip
def test_numbers_are_numbers(tmp_path: Path, override: str, value: float):
    assert loaded(tmp_path, BASE, override).optimizer.lr == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("upcycle.seed=-1", r"upcycle\.seed is -1, must be greater than or equal to 0"),
        ("run.seed=-1", r"run\.seed is -1"),
        ("upcycle.permutation_seed=-5", r"upcycle\.permutation_seed is -5"),
        ("run.seed=010", r"run\.seed is '010', must be an integer"),
        ("run.seed=1:30", r"run\.seed is '1:30', must be an integer"),
        ("run.dir=~", r"run\.dir is null, must be a path"),
        ("optimizer.lr=.inf", r"optimizer\.lr"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, BASE, override)
