"""Test ``plan`` and ``flops`` as typed, with known models and without arguments."""

import json
import sys

import pytest

from megatron_moe.cli import main as cli


def printed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict:
    """Run the command line with --json and return what it prints."""
    monkeypatch.setattr(sys, "argv", ["megatron-moe", *words, "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Run the command line and return its message on stderr."""
    monkeypatch.setattr(sys, "argv", ["megatron-moe", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_known_model_is_planned_by_name(capsys, monkeypatch):
    plain = printed(capsys, monkeypatch, "plan", "--model", "llama-3-8b", "--gpus", "128")
    sixteen = printed(
        capsys, monkeypatch, "plan", "--model", "meta-llama/Meta-Llama-3-8B", "--gpus", "128",
        "moe.num_moe_experts=16",
    )  # fmt: skip
    assert len(plain["best"]) == 10
    assert sixteen["num_legal"] > plain["num_legal"]


def test_a_known_model_is_counted_by_name(capsys, monkeypatch):
    counts = printed(capsys, monkeypatch, "flops", "qwen3-30b-a3b")
    assert counts["total_parameters"] == 30_532_122_624
    assert 3.3e9 <= counts["active_parameters"] < 3.4e9  # the model card says 3.3 B


def test_a_known_moe_is_planned_as_it_is(capsys, monkeypatch):
    planned = printed(capsys, monkeypatch, "plan", "--model", "mixtral-8x7b", "--gpus", "64")
    assert planned["best"]


def test_plan_refuses_what_it_cannot_plan(capsys, monkeypatch):
    for words in ([], ["train.steps=5"]):
        message = refused(capsys, monkeypatch, "plan", *words)
        assert message.startswith("ConfigError: plan needs CONFIG.yaml, or --model NAME")
    message = refused(capsys, monkeypatch, "plan", "--model", "lama-3-8b")
    assert "similar names: llama-3-8b" in message


def test_plan_says_what_it_leaves_out(capsys, monkeypatch, tmp_path):
    """A run on CPUs, and text that is not there yet; otherwise nothing."""
    (tmp_path / "here.txt").write_text("text")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{dir: x}}\nsource: {{path: Llama-3.2-1B}}\nmoe: {{num_moe_experts: 4}}\n"
        f"data: {{path: {tmp_path}/here.txt}}\ntrain: {{steps: 500, global_batch_size: 64}}\n"
    )

    def notes(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["megatron-moe", "plan", str(path), "--json", *overrides])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().err

    silent = notes()
    assert "does not exist yet" not in silent
    assert "run.device" not in silent
    paths = (f"data.path={tmp_path}/gone", f"data.validation_path={tmp_path}/v")
    said = notes("run.device=cpu", *paths)
    assert "run.device is cpu, but plan predicts 8 h100" in said
    assert f"data.path ({tmp_path}/gone) does not exist yet" in said
    assert f"data.validation_path ({tmp_path}/v) does not exist yet" in said
