"""Row 35: an export of a chosen dtype and shard size, with a model card, and to a hub.

transformers reads the folders; the expected weights are those of the default export, cast by torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_dense
from training_runs import run_training, tree, write_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe.cli.options import parse_size
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.hub import hub_for
from megatron_moe.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    settings = tree(
        root / "run", save_dense(root / "dense"), write_tokens(root / "tokens"),
        train={"steps": 1, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"warmup_steps": 0}, upcycle={"verify": "always"},
    )  # fmt: skip
    run_training(settings, world_size=1)
    export_checkpoint(root / "run", root / "default")
    return root / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_weights_are_cast_by_torch(run: Path, tmp_path: Path, name: str):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    export_checkpoint(run, tmp_path / "hf", dtype=name)
    expected = weights(run.parent / "default")
    result = weights(tmp_path / "hf")
    assert result.keys() == expected.keys()
    for key, tensor in result.items():
        assert torch.equal(tensor, expected[key].to(dtype)), key
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == dtype


@pytest.mark.distributed
def test_files_are_as_small_as_asked(run: Path, tmp_path: Path):
    export_checkpoint(run, tmp_path / "hf", max_shard_bytes=parse_size("100kB", option="x"))
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    largest = max(t.numel() * 4 for t in weights(tmp_path / "hf").values())
    assert all(path.stat().st_size <= max(100_000, largest) + 10_000 for path in files)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading
    for key, tensor in weights(tmp_path / "hf").items():
        assert torch.equal(tensor, weights(run.parent / "default")[key])


@pytest.mark.distributed
def test_values_beyond_fp16_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megatron_moe.commands import export

    monkeypatch.setattr(export, "_factors", lambda entry, *_, **__: (1e9,) * len(entry.names))
    with pytest.raises(CheckpointError, match=r"cannot hold.*(?s:.*)--dtype bf16 or fp32"):
        export_checkpoint(run, tmp_path / "hf", dtype="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_the_card_says_what_the_model_is(run: Path):
    card = (run.parent / "default" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    receipt = json.loads((run / "receipt.json").read_text())
    for words in (
        "library_name: transformers", "dense (llama, 4 layers)", "`copy`, 4 experts of 96 neurons",
        "1 steps, 128 tokens", "`MixtralForCausalLM`", f"{lines[-1]['loss/lm']:.4f}",
        f"{receipt['verification']['max_logit_error']:.2e}", 'from_pretrained("default"',
    ):  # fmt: skip
        assert words in card, words


@pytest.mark.distributed
def test_the_card_of_a_folder_in_its_run_is_named_after_the_run(run: Path):
    export_checkpoint(run, run / "hf")
    card = (run / "hf" / "README.md").read_text()
    assert f"\n# {run.name}\n" in card
    assert 'from_pretrained("hf"' in card


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 mb", 1_500_000), ("7", 7)],
)
def test_sizes(text: str, size: int):
    assert parse_size(text, option="--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "1e9"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"--max-shard-size \(.*such as 500MB"):
        parse_size(text, option="--max-shard-size")


OFFLINE = {
    "offline": {"HF_HUB_OFFLINE": "1"},
    "unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "x"},
    "no token": {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": ""},
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", OFFLINE)
def test_a_hub_that_cannot_be_used_is_refused_before_the_export(
    run: Path, tmp_path: Path, case: str
):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-m", "megatron_moe", "export", str(run), "--out", str(tmp_path / "hf"),
         "--push-to-hub", "me/model"],
        env={**kept, **OFFLINE[case], "HF_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("ConfigError: --push-to-hub (me/model) needs a hub")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["a/b/c", "../up", "", "with space"])
def test_what_is_no_repository_is_refused(name: str):
    with pytest.raises(ConfigError, match="must be the name of a repository"):
        hub_for(name)
