"""A shipped configuration whose dense model is not there: the message says how to get it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dense_models import H100_FILES

from megatron_moe.cli import main as cli
from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.obtain import HUB_NAMES
from megatron_moe.hf.spec import spec_from_config

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
@pytest.mark.parametrize(
    "words", [("plan", "{}"), ("train", "{}", "--dry-run", "--world-size", 8)], ids=["plan", "dry"]
)
def test_a_missing_model_is_named_with_the_command_that_gets_it(
    file: Path, words: tuple, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)  # a user may have the models in the repository's folder
    monkeypatch.setattr(sys, "argv", sys.argv)
    folder = load(RunConfig, file).source.path
    output = refused(capsys, *(str(word).format(file) for word in words))
    assert output.startswith(f"CheckpointError: cannot read {folder}/config.json: ")
    if file == DEMO:
        assert f"python tools/get_dense.py {folder}\n" in output
        assert (ROOT / "tools" / "get_dense.py").is_file()
    elif folder.name == WITHOUT_WEIGHTS:
        assert f"hf download ORGANIZATION/{WITHOUT_WEIGHTS} --local-dir {folder}\n" in output
    else:
        assert f"hf download {HUB_NAMES[folder.name]} --local-dir {folder}\n" in output
        assert f"hf download {HUB_NAMES[folder.name]} config.json --local-dir {folder}\n" in output


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
    assert (spec.num_layers, spec.hidden_size) == (56, 6144)
