"""Test get_dense with folders and hub names; test_smollm2.py tests the default model."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from get_dense import get_dense

from megatron_moe.errors import CheckpointError, UserError

TOOL = Path(__file__).parents[2] / "tools" / "get_dense.py"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SHARDS = ["a-00001.safetensors", "a-00002.safetensors"]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = {"weight_map": {"x": SHARDS[0], "y": SHARDS[1], "z": SHARDS[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in [*SHARDS, "tokenizer.json", "consolidated.safetensors", "optimizer.bin"]:
        (folder / name).write_text(name)
    return folder


def get(tmp_path: Path, source: str | Path) -> Path:
    get_dense(tmp_path / "out", source=str(source), cache=tmp_path / "cache")
    return tmp_path / "out"


def test_a_local_folder_is_linked_with_what_a_run_reads(tmp_path: Path, origin: Path):
    out = get(tmp_path, origin)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors.index.json",
        *SHARDS,
        "tokenizer.json",
        "source.json",
    }
    assert (out / SHARDS[1]).read_text() == SHARDS[1]
    assert (out / SHARDS[1]).is_symlink()


def test_the_second_run_does_nothing_and_another_source_is_refused(
    tmp_path: Path, origin: Path, capsys: pytest.CaptureFixture[str]
):
    out = get(tmp_path, origin)
    before = out.stat().st_mtime_ns
    get(tmp_path, origin)
    assert "nothing to do" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was created for another request"):
        get(tmp_path, "someone/else")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (SHARDS[1], "names 2 files, 1 of them missing:\n  a-00002"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors.index.json", "neither model.safetensors nor"),
        ("config.json", "cannot read"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_left(
    tmp_path: Path, origin: Path, remove: str, message: str
):
    (origin / remove).unlink()
    with pytest.raises(CheckpointError, match=message):
        get(tmp_path, origin)
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


def test_a_hub_name_takes_the_snapshot_without_second_copies(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(origin)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    out = get(tmp_path, "someone/model")
    assert (out / SHARDS[0]).exists()
    assert json.loads((out / "source.json").read_text())["request"] == {"from": "someone/model"}
    assert "model*.safetensors" in asked["someone/model"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["someone/model"])


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path: Path):
    with pytest.raises(UserError, match="is not a folder on this machine"):
        get(tmp_path, tmp_path / "no" / "such")


def test_an_unreachable_hub_is_a_message_with_the_way_out(tmp_path: Path):
    command = [sys.executable, str(TOOL), str(tmp_path / "out"), "--from", "someone/model"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "UserError: cannot get someone/model from the Hugging Face hub" in result.stderr
    assert "remove --from to get SmolLM2-135M" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
