"""``megatron-moe init``: every file it writes is legal, fits, and starts."""

import json
import os
import pty
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from commands import run_command
from tiny import save_dense, save_moe
from training_runs import read_metrics, write_tokens

from megatron_moe.cli import main as cli
from megatron_moe.cli.init import source_model
from megatron_moe.cli.options import parse_count
from megatron_moe.commands.init import drafted, init
from megatron_moe.errors import ConfigError
from megatron_moe.experts.from_source import load_run
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.check import check_layout
from megatron_moe.planner.search import NothingFitsError
from megatron_moe.planner.starting import Request
from megatron_moe.planner.whole_run import checkpoint_bytes
from megatron_moe.rules.check import violations

ROOT = Path(__file__).parents[1]
MODELS = (
    "llama-2-7b", "llama-3-8b", "llama-3-70b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.1",
    "mistral-nemo-12b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-8b", "qwen3-32b", "smollm2-1.7b",
)  # fmt: skip
MOE_MODELS = ("mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b", "qwen3-30b-a3b")
GPUS = (1, 8, 64, 128, 1024)


def request_for(model: str, gpus: int, **changes) -> Request:
    return Request(source=source_model(model)[1], gpus=gpus, **changes)


@pytest.mark.parametrize(
    ("model", "gpus"),
    [*((model, gpus) for model in MODELS for gpus in GPUS), *((name, 128) for name in MOE_MODELS)],
)
def test_the_file_is_legal_and_fits(model: str, gpus: int, tmp_path: Path):
    """Or the message says why there is none, and what would fit."""
    spec, _ = source_model(model)
    out = tmp_path / "run.yaml"
    try:
        init(request_for(model, gpus), spec, out)
    except NothingFitsError as error:
        assert gpus < 128, "all of these models fit on 128 GPUs"
        assert not out.exists()
        lines = str(error).splitlines()
        assert lines[0].startswith(f"no layout of {gpus} h100 holds the model")
        more = int(next(line for line in lines if f"instead of {gpus}:" in line).split()[0])
        assert drafted(request_for(model, more), spec).candidate is not None
        return
    config = load_run(out)
    result = check_layout(config, spec, gpus=gpus)
    assert result.legal
    assert result.fits, result.reasons
    assert result.candidate is not None
    for engine in ("torch", "transformer_engine") if config.run.engine == "auto" else ():
        named = config.model_copy(update={"run": config.run.model_copy(update={"engine": engine})})
        other = check_layout(named, spec, gpus=gpus)
        assert other.legal
        assert other.fits, f"with {engine}: {other.reasons}"
    tokens = config.train.steps * config.train.global_batch_size * config.data.seq_length
    assert 0 <= tokens / 1e11 - 1 < 0.001


@pytest.mark.distributed
def test_the_dry_run_of_a_file_builds(tmp_path: Path):
    """For each model, on Megatron-Core's real objects; a child keeps torch unpatched."""
    cases = [(model, 128, 17 * index % 128) for index, model in enumerate(MODELS)]
    cases += [(model, 128, 77) for model in MOE_MODELS[:2]]
    cases += [("llama-3.2-1b", 8, 3), ("qwen2.5-7b", 64, 17), ("mistral-nemo-12b", 1024, 1023)]

    def check(_: int) -> None:
        from megatron_moe.commands.dry_run import dry_run

        for model, gpus, rank in cases:
            out = tmp_path / f"{model}-{gpus}.yaml"
            init(request_for(model, gpus), source_model(model)[0], out)
            result = dry_run(load_run(out), rank=rank, world_size=gpus)
            assert result.counted == result.planned

    mp.start_processes(check, nprocs=1, start_method="fork")


@pytest.mark.distributed
def test_train_runs_on_the_file_unchanged(tmp_path: Path):
    """A tiny model on two ranks of this machine; its checkpoint is as large as predicted."""
    save_dense(tmp_path / "tiny dense")
    write_tokens(tmp_path / "tokens", documents=40)
    words = ["init", "tiny dense", "--gpu", "cpu", "--gpus", 2, "--experts", 4]
    done = run_command(*words, "--data", "tokens", cwd=tmp_path, check=True)
    assert done.stdout == "run.yaml\n"
    run_command("train", "run.yaml", "--ranks", 2, cwd=tmp_path, check=True)
    config = load_run(tmp_path / "run.yaml")
    run_dir = tmp_path / config.run.dir
    assert read_metrics(run_dir)[-1]["step"] == 20
    (saved,) = [
        sum(file.stat().st_size for file in folder.rglob("*.distcp"))
        for folder in (run_dir / "checkpoints").iterdir()
        if folder.name.startswith("step_") and folder.name.endswith("20")
    ]
    from megatron_moe.planner.shape import upcycled_shape
    from megatron_moe.planner.workload import workload_of

    shape = upcycled_shape(read_spec(tmp_path / "tiny dense"), config.moe)
    # Names and metadata of about 200 tensors weigh something beside 0.4 M parameters.
    assert saved == pytest.approx(checkpoint_bytes(shape, workload_of(config)), rel=0.1)


@pytest.mark.distributed
def test_a_moe_is_continued_as_it_is(tmp_path: Path, capsys, monkeypatch):
    save_moe(tmp_path / "olmoe", "olmoe")
    write_tokens(tmp_path / "tokens", documents=40)
    monkeypatch.chdir(tmp_path)
    for option in ("--experts", "--topk"):
        message = refused(capsys, monkeypatch, "olmoe", option, 4)
        assert f"{option} (4) is for dense models: olmoe is a MoE" in message
    words = ["olmoe", "--gpu", "cpu", "--gpus", 2, "--data", "tokens"]
    run_command("init", *words, cwd=tmp_path, check=True)
    config = load_run(Path("run.yaml"))
    assert (config.upcycle.method, config.moe.num_moe_experts) == ("keep", 4)
    assert config.moe.router_order == "softmax_topk"
    assert config.run.dir == Path("runs/olmoe-keep")
    run_command("train", "run.yaml", "--ranks", 2, cwd=tmp_path, check=True)
    assert read_metrics(config.run.dir)[-1]["step"] == 20


@pytest.mark.parametrize("gpus", [24, 48])
def test_other_numbers_of_gpus_get_a_batch_that_they_divide(gpus: int):
    spec, _ = source_model("llama-3.2-3b")
    draft = drafted(request_for("llama-3.2-3b", gpus), spec)
    assert violations(draft.config, spec, gpus) == []
    assert draft.config.train.global_batch_size % 3 == 0


def test_a_named_engine_is_kept():
    spec, _ = source_model("llama-3-8b")
    draft = drafted(request_for("llama-3-8b", 64, engine="torch"), spec)
    assert draft.config.run.engine == "torch"
    assert draft.config.train.recompute != "selective"


def refused(capsys, monkeypatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["megatron-moe", "init", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_refusals(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert "init needs SOURCE" in refused(capsys, monkeypatch)
    assert "similar names" in refused(capsys, monkeypatch, "lama-3-8b")
    message = refused(capsys, monkeypatch, "llama-3-8b", "--tokens", "many")
    assert message.startswith("ConfigError: --tokens (many) must be a number of tokens")
    message = refused(capsys, monkeypatch, "llama-3-8b", "--gpus", 64, "--topk", 9)
    assert "moe_router_topk (9)" in message
    # Also if no layout holds the model, and so none is checked.
    message = refused(capsys, monkeypatch, "llama-3-70b", "--gpus", 1, "--topk", 9)
    assert "moe_router_topk (9) must be at most moe.num_moe_experts (8)" in message
    (tmp_path / "run.yaml").write_text("mine")
    message = refused(capsys, monkeypatch, "llama-3-8b", "--gpus", 64)
    assert "--out (run.yaml) exists already" in message
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_next_commands_name_what_is_missing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec, _ = source_model("llama-3-8b")
    commands = init(request_for("llama-3-8b", 128), spec, Path("run.yaml"))
    assert commands[0].startswith("hf download meta-llama/Meta-Llama-3-8B ")
    assert commands[1].startswith("megatron-moe tokenize TEXT.jsonl ")
    assert "sbatch --nodes 16 launch/slurm.sbatch run.yaml" in commands
    text = Path("run.yaml").read_text()
    assert all(f"#   {command}\n" in text for command in commands)
    (tmp_path / "models/Meta-Llama-3-8B").mkdir(parents=True)
    (tmp_path / "models/Meta-Llama-3-8B/config.json").write_text(json.dumps({}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.bin").write_text("")
    commands = init(request_for("llama-3-8b", 128), spec, Path("other.yaml"))
    assert commands[0].startswith("megatron-moe plan other.yaml ")


def test_a_terminal_is_asked_for_what_is_missing(tmp_path: Path):
    """Answer on a pseudo-terminal: an unknown model first, then a known one and its GPUs."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
        os.execv(sys.executable, [sys.executable, "-m", "megatron_moe", "init"])
    os.write(terminal, b"lama\nllama-3-8b\n64\n50B\n")
    shown = b""
    while True:
        try:
            block = os.read(terminal, 4096)
        except OSError:  # the child has closed it
            break
        if not block:
            break
        shown += block
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown.decode()
    text = shown.decode()
    for words in ("Source model", "similar names", "Number of h100", "Wrote run.yaml. Next:"):
        assert words in text
    config = load_run(tmp_path / "run.yaml")
    assert config.train.steps * config.train.global_batch_size * 8192 >= 5e10
    assert check_layout(config, source_model("llama-3-8b")[0], gpus=64).fits


def test_counts_are_read_with_their_unit():
    assert [parse_count(text, option="-") for text in ("100B", "1.5t", "10240", "3 M")] == [
        10**11, 15 * 10**11, 10240, 3 * 10**6,
    ]  # fmt: skip
    for text in ("0", "-3", "100 X", "B"):
        with pytest.raises(ConfigError, match="must be a number of tokens"):
            parse_count(text, option="--tokens")
