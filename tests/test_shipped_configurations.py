"""Shipped configurations without their dense model: planned by its known shape, else refused."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from commands import run_command
from dense_models import H100_FILES

from megatron_moe.cli import main as cli
from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.known import model_named
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.shape import dense_shape

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"
WITHOUT_WEIGHTS = "dense-56x6144"
"""A shape that no published model has; its configuration says what config.json holds."""


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    """What the command prints on stderr when it refuses."""
    sys.argv = ["megatron-moe", *map(str, args)]
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("file", [*H100_FILES, DEMO], ids=lambda file: file.stem)
def test_a_missing_model_is_named_with_the_command_that_gets_it(
    file: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)  # a user may have the models in the repository's folder
    monkeypatch.setattr(sys, "argv", sys.argv)
    folder = load(RunConfig, file).source.path
    output = refused(capsys, "train", file)
    assert output.startswith(f"CheckpointError: cannot read {folder}/config.json: ")
    assert way_to(folder) in output


def way_to(folder: Path) -> str:
    """The line that says how to get a folder of configs/."""
    if folder.name == "smollm2-135m":
        assert (ROOT / "tools" / "get_dense.py").is_file()
        return f"python tools/get_dense.py {folder}\n"
    if folder.name == WITHOUT_WEIGHTS:
        return "no published model has this shape"
    return f"hf download {model_named(folder.name).hub} --local-dir {folder}\n"


@pytest.mark.parametrize("file", [*H100_FILES, DEMO], ids=lambda file: file.stem)
def test_a_shipped_configuration_is_planned_without_its_model(
    file: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """In a folder without models, as on a fresh clone; the note does not disturb the JSON."""
    monkeypatch.chdir(tmp_path)
    gpus = 4 if file == DEMO else int(file.stem.rpartition("-")[2])
    words = ["megatron-moe", "plan", str(file), "--check", "--json", "--gpus", str(gpus)]
    monkeypatch.setattr(sys, "argv", words)
    with suppress(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"]
    assert err.startswith(f"{load(RunConfig, file).source.path} does not exist. Its shape is taken")
    assert way_to(load(RunConfig, file).source.path) in err


def test_a_dry_run_needs_no_model(tmp_path: Path):
    """In a child: a dry run replaces functions of torch for the whole process."""
    (file,) = [file for file in H100_FILES if file.stem == "llama3.2-3b-e8t2-8"]
    words = ["train", file, "--dry-run", "--world-size", "8", "--json"]
    done = run_command(*words, cwd=tmp_path, check=True)
    result = json.loads(done.stdout)
    assert result["state_bytes"] == result["planned_state_bytes"]
    assert "does not exist. Its shape is taken" in done.stderr


def test_a_missing_model_that_is_not_known_is_named(capsys, tmp_path: Path):
    output = refused(capsys, "plan", DEMO, f"source.path={tmp_path / 'mine'}")
    assert output.startswith(f"CheckpointError: cannot read {tmp_path / 'mine'}/config.json: ")
    assert "hf download ORGANIZATION/mine config.json" in output


def test_the_printed_command_is_one_of_the_hub_client():
    program = Path(sys.executable).with_name("hf")
    done = subprocess.run(
        [program, "download", "--help"], capture_output=True, text=True, check=True
    )
    assert "REPO_ID" in done.stdout
    assert "[FILENAMES]" in done.stdout
    assert "--local-dir" in done.stdout


def test_the_shape_without_weights_is_written_out_in_its_configuration():
    (file,) = [file for file in H100_FILES if WITHOUT_WEIGHTS in file.read_text()]
    comment = "".join(line.removeprefix("#") for line in file.read_text().split("\n")[:7])
    text = comment[comment.index("{") : comment.index("}") + 1]
    spec = spec_from_config(json.loads(text))
    known = dense_shape(spec_from_config(model_named(WITHOUT_WEIGHTS).config))
    assert dense_shape(spec) == known
    assert (spec.num_layers, spec.hidden_size) == (56, 6144)
