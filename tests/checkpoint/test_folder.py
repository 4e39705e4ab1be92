"""Tests of checkpoint folders: publishing, finding the newest, pruning, error messages."""

import json
import shutil
from pathlib import Path

import pytest
from small_checkpoints import CONFIG, progress, save, saved_steps

from megatron_moe.checkpoint.folder import (
    describe,
    find_checkpoint,
    newest,
    prune,
    read_config,
    read_progress,
    run_of,
    start_folder,
    step_folder,
)
from megatron_moe.config.load import dump
from megatron_moe.errors import CheckpointError, ConfigError


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    folder.mkdir()
    for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "model.safetensors", "README.md",
    ):  # fmt: skip
        (folder / name).write_text(name)
    return folder


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path):
    assert newest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path) is None


def test_what_is_published_is_newest_and_whole(tmp_path: Path, dense: Path):
    for step in (10, 20):
        final = save(tmp_path, step, dense)
        assert newest(tmp_path) == final == tmp_path / "checkpoints" / f"step_000000{step}"
        assert read_progress(final) == progress(step)
        assert read_config(final) == CONFIG
        assert (final / "tensors.distcp").read_text() == f"tensors of {step}"
    assert saved_steps(tmp_path) == ["step_00000010", "step_00000020"], "nothing partial is left"


def test_a_checkpoint_carries_what_export_needs_and_no_weights(tmp_path: Path, dense: Path):
    carried = {path.name for path in (save(tmp_path, 1, dense) / "source").iterdir()}
    assert carried == {path.name for path in dense.iterdir()} - {"model.safetensors", "README.md"}


def test_an_unpublished_save_counts_for_nothing(tmp_path: Path, dense: Path):
    """Simulate a kill after all files are written but before the rename."""
    kept = save(tmp_path, 10, dense)
    partial = start_folder(step_folder(tmp_path, 20))
    describe(partial, progress(20), dump(CONFIG), dense)
    assert newest(tmp_path) == kept
    assert prune(tmp_path, keep=1) == []
    assert kept.exists()


def test_leftovers_of_a_killed_save_do_not_reach_the_next(tmp_path: Path, dense: Path):
    partial = start_folder(step_folder(tmp_path, 10))
    (partial / "old.distcp").write_text("half a tensor")
    final = save(tmp_path, 10, dense)
    assert not (final / "old.distcp").exists()
    assert saved_steps(tmp_path) == ["step_00000010"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path, dense: Path):
    (save(tmp_path, 10, dense) / "stale").write_text("from before the resume")
    final = save(tmp_path, 10, dense)
    assert not (final / "stale").exists()
    assert newest(tmp_path) == final


def test_a_kill_between_rename_and_latest_keeps_the_older(tmp_path: Path, dense: Path):
    first = save(tmp_path, 10, dense)
    second = save(tmp_path, 20, dense)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010\n")
    assert newest(tmp_path) == first
    assert second.exists()


@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        ((1, 2, 3, 4), 2, (3, 4)),
        ((1, 2), 3, (1, 2)),
        ((9, 10, 100), 1, (100,)),
        ((99_999_999, 100_000_000), 1, (100_000_000,)),
    ],
    ids=["oldest-go", "fewer-than-kept", "by-number", "nine-digits"],
)
def test_prune_keeps_the_newest(tmp_path: Path, dense: Path, steps, keep: int, left):
    for step in steps:
        save(tmp_path, step, dense)
    removed = prune(tmp_path, keep)
    assert {p.name for p in removed} == {
        step_folder(tmp_path, s).name for s in set(steps) - set(left)
    }
    assert saved_steps(tmp_path) == sorted(step_folder(tmp_path, s).name for s in left)
    assert newest(tmp_path) == step_folder(tmp_path, left[-1])


def test_prune_never_takes_the_checkpoint_that_latest_names(tmp_path: Path, dense: Path):
    """The operator wrote step 10 into latest; steps 20 and 30 are an abandoned timeline."""
    for step in (10, 20, 30):
        save(tmp_path, step, dense)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010\n")
    final = save(tmp_path, 15, dense)
    prune(tmp_path, keep=1)
    assert newest(tmp_path) == final
    assert read_progress(final) == progress(15)


def test_prune_touches_nothing_else(tmp_path: Path, dense: Path):
    for step in (1, 2):
        save(tmp_path, step, dense)
    others = [tmp_path / "checkpoints" / name for name in ("step_best", "step_1", "notes")]
    for other in others:
        other.mkdir()
    prune(tmp_path, keep=1)
    assert all(other.exists() for other in others)
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_a_latest_that_names_a_missing_folder_says_what_to_do(tmp_path: Path, dense: Path):
    shutil.rmtree(save(tmp_path, 10, dense))
    with pytest.raises(
        CheckpointError, match=r"names step_00000010, but .* is not a complete"
    ) as e:
        newest(tmp_path)
    assert "\n  remove " in str(e.value)
    assert "to restart the run: there is no other checkpoint" in str(e.value)


@pytest.mark.parametrize("name", ["../../other/checkpoints/step_00000010", "/etc", "", "step_1"])
def test_a_latest_that_leaves_its_folder_is_refused(tmp_path: Path, dense: Path, name: str):
    save(tmp_path, 10, dense)
    (tmp_path / "checkpoints" / "latest").write_text(name + "\n")
    with pytest.raises(CheckpointError, match=r"latest names '.*', which is not a checkpoint"):
        newest(tmp_path)


@pytest.mark.parametrize("at", ["run", "checkpoint"])
def test_a_run_and_a_checkpoint_both_name_a_checkpoint(tmp_path: Path, dense: Path, at: str):
    final = save(tmp_path, 10, dense)
    assert find_checkpoint(tmp_path if at == "run" else final) == final


def test_a_checkpoint_can_be_named_that_is_not_the_newest(tmp_path: Path, dense: Path):
    first = save(tmp_path, 10, dense)
    save(tmp_path, 20, dense)
    assert find_checkpoint(first) == first


def test_what_is_no_checkpoint_is_said(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"is neither a checkpoint .* nor a run with one"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: json.dumps({**json.loads(text), "extra": 1}),
        lambda text: json.dumps({"step": 10}),
    ],
    ids=["cut", "empty", "another-form", "unknown-key", "missing-keys"],
)
def test_a_damaged_checkpoint_json_is_named(tmp_path: Path, dense: Path, damage):
    path = save(tmp_path, 10, dense) / "checkpoint.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
        read_progress(path.parent)


def test_a_checkpoint_that_a_running_job_removes_is_named(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"removed while it was read[^\n]*\n.*checkpoint\.keep"
    ):
        read_progress(step_folder(tmp_path, 3))


def test_a_damaged_configuration_is_named(tmp_path: Path, dense: Path):
    final = save(tmp_path, 10, dense)
    (final / "config.yaml").write_text("run: {dir: 3")
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML"):
        read_config(final)


def test_a_run_is_read_where_it_lies_and_with_other_settings(tmp_path: Path, dense: Path):
    run = tmp_path / "run"
    save(run, 3, dense)
    shutil.move(run, tmp_path / "moved run")
    checkpoint, config = run_of(tmp_path / "moved run", ["parallel.expert_parallel_size=2"])
    assert checkpoint == step_folder(tmp_path / "moved run", 3)
    assert config.run.dir == tmp_path / "moved run"
    assert config.parallel.expert_parallel_size == 2
    assert config.source.path == checkpoint / "source"  # the configured one is missing
    assert run_of(checkpoint, [f"source.path={dense}"])[1].source.path == dense
    with pytest.raises(ConfigError, match="not a setting"):
        run_of(checkpoint, ["parallel.epp=2"])


def test_a_checkpoint_of_version_0_1_is_read(tmp_path: Path, dense: Path):
    checkpoint = save(tmp_path / "run", 3, dense)
    settings = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(settings.replace("source:", "dense:"))
    (checkpoint / "source").rename(checkpoint / "dense")
    assert run_of(checkpoint)[1].source.path == checkpoint / "dense"
    assert read_config(checkpoint) == CONFIG
