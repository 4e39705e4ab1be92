"""`generate` equals greedy decoding by hand with transformers, and is reproducible by seed."""

import json
from pathlib import Path

import pytest
import torch
from judged import Judged
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megatron_moe.cli.main import app
from megatron_moe.commands.export import export_checkpoint

pytestmark = pytest.mark.distributed
PROMPTS = ["def parse(", "caf\u00e9"]
NEW_TOKENS = 6


def generated(source: Path, *words: str) -> list[str]:
    options = ["--new-tokens", str(NEW_TOKENS), "--json"]
    result = CliRunner().invoke(app, ["generate", str(source), *PROMPTS, *options, *words])
    assert result.exception is None, result.exception
    completions = json.loads(result.stdout)
    assert [completion["prompt"] for completion in completions] == PROMPTS
    return [completion["text"] for completion in completions]


@torch.no_grad()
def likeliest(folder: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt).input_ids
    for _ in range(NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_a_run_and_its_export_say_the_same(judged: Judged, tmp_path: Path):
    export_checkpoint(judged.run, tmp_path / "hf")
    expected = [likeliest(tmp_path / "hf", prompt) for prompt in PROMPTS]
    assert generated(judged.run) == expected
    assert generated(tmp_path / "hf") == expected
    sampled = generated(tmp_path / "hf", "--temperature", "2", "--seed", "3")
    assert generated(tmp_path / "hf", "--temperature", "2", "--seed", "3") == sampled != expected
    assert generated(tmp_path / "hf", "--temperature", "2", "--seed", "4") != sampled


def test_neither_a_run_nor_an_export(tmp_path: Path):
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "a"])
    assert "is neither a checkpoint (no checkpoint.json) nor a run" in str(result.exception)
