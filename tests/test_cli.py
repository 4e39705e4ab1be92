"""The command line: help at once, and what a user got wrong in words, with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_command
from tiny import save_dense
from training_runs import read_metrics, run_training, tree, write_tokens

import megatron_moe
from megatron_moe.cli import main as cli
from megatron_moe.cli import start
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError, JobError

DENSE = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def started_by_hand(monkeypatch: pytest.MonkeyPatch):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    """A legal configuration of a dense folder that holds only a config.json."""
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(DENSE))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path / 'run'}, device: cpu}}\n"
        f"source: {{path: {tmp_path / 'dense'}}}\n"
        "moe: {num_moe_experts: 4}\n"
        f"data: {{path: {tmp_path / 'text.txt'}, seq_length: 64}}\n"
        "train: {steps: 0, global_batch_size: 4}\n"
    )
    return path


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *args: object) -> str:
    """Run the command line; what it says on stderr when it exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["megatron-moe", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return err


def python(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("command", [(), ("train",), ("export",)], ids=["all", "train", "export"])
def test_help_names_the_command(command: tuple[str, ...]):
    done = python("-m", "megatron_moe", *command, "--help")
    assert done.returncode == 0, done.stderr
    for word in command or ("train", "export"):
        assert word in done.stdout


def test_help_and_a_wrong_setting_import_neither_torch_nor_megatron(yaml_file: Path):
    script = (
        "import sys\n"
        "from megatron_moe.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    print('exit', end.code)\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    output = python("-c", script, "--help").stdout.splitlines()[-2:]
    assert output == ["exit 0", "[]"]
    output = python("-c", script, "train", yaml_file, "moe.experts=4").stdout.splitlines()
    assert output == ["exit 2", "[]"]


def test_what_only_reads_a_run_imports_neither_torch_nor_megatron():
    script = (
        "import sys\n"
        "import megatron_moe.commands.report\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\n"
    )
    assert python("-c", script).stdout == "[]\n"


def test_a_refusal_of_the_real_program_has_no_traceback(tmp_path: Path):
    done = python("-m", "megatron_moe", "train", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"ConfigError: cannot read the configuration {tmp_path / 'none.yaml'}: "
        "No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["moe.num_moe_expert=4"],
         "ConfigError: moe.num_moe_expert is not a setting; did you mean 'num_moe_experts'?\n"),
        (["train.steps=many"],
         "ConfigError: train.steps is 'many', must be an integer\n"),
        (["train.steps"],
         "ConfigError: override 'train.steps' is not of the form key.path=value\n"),
        (["train.steps=-1", "moe.topk=2", "data.seq_length=0"], None),
    ],
    ids=["unknown-key", "wrong-type", "no-equals", "three-at-once"],
)  # fmt: skip
def test_a_wrong_setting_is_refused(yaml_file, capsys, monkeypatch, overrides, message):
    output = refused(capsys, monkeypatch, "train", yaml_file, *overrides)
    if message is not None:
        assert output == message
    else:
        assert [line.split()[1] for line in output.splitlines()] == [
            "moe.topk", "data.seq_length", "train.steps",
        ]  # fmt: skip


def test_a_missing_dense_folder_is_refused(yaml_file, capsys, monkeypatch, tmp_path):
    output = refused(capsys, monkeypatch, "train", yaml_file, f"source.path={tmp_path / 'nowhere'}")
    path = tmp_path / "nowhere" / "config.json"
    assert output.startswith(f"CheckpointError: cannot read {path}: No such file or directory.\n  ")
    assert not (tmp_path / "run").exists(), "nothing is made before everything is checked"


def test_weights_and_biases_without_its_package_is_refused(
    yaml_file, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("megatron_moe.rules.installed.find_spec", lambda package: None)
    output = refused(
        capsys, monkeypatch, "train", yaml_file, "log.wandb_project=moe", "log.tensorboard=false"
    )
    assert output == (
        "ConfigError: log.wandb_project (moe) requires the package wandb, which is not installed.\n"
        "  pip install 'megatron-moe[wandb]', or log.wandb_project=null\n"
    )
    assert not (tmp_path / "run").exists(), "nothing is made before everything is checked"


def test_an_unsupported_model_is_refused_with_all_reasons(yaml_file, capsys, monkeypatch, tmp_path):
    config = DENSE | {"hidden_act": "gelu", "mlp_bias": True}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    output = refused(capsys, monkeypatch, "train", yaml_file).splitlines()
    assert output[0].startswith("CheckpointError: ")
    assert [line[:2] for line in output[1:]] == ["  ", "  "]


def test_an_illegal_layout_is_refused_before_any_rank_starts(
    yaml_file, capsys, monkeypatch, tmp_path
):
    output = refused(
        capsys, monkeypatch, "train", yaml_file, "--ranks", 3,
        "parallel.tensor_parallel_size=5", "parallel.expert_parallel_size=3",
        "data.seq_length=60",
    )  # fmt: skip
    heads = [line for line in output.splitlines() if not line.startswith("  ")]
    assert len(heads) == 3
    assert all(line.startswith("ConfigError: ") for line in heads)
    for words in (
        "world_size (3) must be divisible by pp * cp * tp = 1 * 1 * 5 = 5",
        "parallel.tensor_parallel_size (5) must divide num_attention_heads",
        "moe.num_moe_experts (4)",
    ):
        assert words in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node0"},
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": "0",
            "MASTER_ADDR": "node0",
            "SLURM_STEP_ID": "0",
        },
    ],
    ids=["torchrun", "slurm"],
)
def test_local_ranks_inside_a_started_job_are_refused(
    yaml_file, capsys, monkeypatch, environment: dict[str, str]
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = refused(capsys, monkeypatch, "train", yaml_file, "--ranks", 2)
    assert output.startswith("ConfigError: --ranks (2) starts ranks on this machine")
    assert "already started 4.\n  remove --ranks" in output


def test_an_export_of_no_checkpoint_is_refused(capsys, monkeypatch, tmp_path):
    output = refused(capsys, monkeypatch, "export", tmp_path, "--out", tmp_path / "out")
    assert output.startswith(f"CheckpointError: {tmp_path} is neither a checkpoint")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args", [("train",), ("train", "x.yaml", "--ranks", "0"), ("tarin",), ("export", "x")], ids=str
)
def test_a_wrong_command_line_is_refused(capsys, monkeypatch, args):
    output = refused(capsys, monkeypatch, *args)
    assert "Usage" in output


def test_a_bug_of_ours_keeps_its_traceback(yaml_file, monkeypatch):
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(start, "check", broken)
    monkeypatch.setattr(sys, "argv", ["megatron-moe", "train", str(yaml_file)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_tokenize_writes_what_data_path_takes(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"</s>": 0, "one": 1, "two": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "text.jsonl").write_text('{"text": "one two"}\n{"text": "two"}\n')
    done = run_command(
        "tokenize", tmp_path / "text.jsonl", "--tokenizer", tmp_path / "model",
        "--out", tmp_path / "out", "--json", check=True,
    )  # fmt: skip
    counts = json.loads(done.stdout)["counts"]
    assert (counts["documents"], counts["tokens"]) == (2, 5)
    assert (tmp_path / "out.bin").exists()
    assert (tmp_path / "out.idx").exists()


@pytest.mark.parametrize(
    ("overrides", "expert_parallel", "said"),
    [
        ([], 1, "Layout for 1 rank(s): parallel.expert_parallel_size=1\n"),
        (["parallel.expert_parallel_size=4"], 4, ""),
    ],
)
def test_a_layout_that_nobody_named_fits_the_ranks_at_hand(
    tmp_path: Path, monkeypatch, capsys, overrides: list[str], expert_parallel: int, said: str
):
    """As when a run of four ranks is evaluated on one; a named layout is left to the rules."""
    settings = tree(tmp_path / "run", save_dense(tmp_path / "dense"), tmp_path / "text",
                    parallel={"expert_parallel_size": 4})  # fmt: skip
    started = []
    monkeypatch.setattr(start, "on_ranks", lambda story, config, ranks: started.append(config))
    config = build(RunConfig, settings)
    capsys.readouterr()  # the progress bar of saving
    start.on_ranks_at_hand(lambda config, world: None, config, None, overrides=overrides)
    assert started[0].parallel.expert_parallel_size == expert_parallel
    assert capsys.readouterr().err == said


@pytest.mark.distributed
def test_a_restart_with_fewer_ranks_continues_if_it_may_adapt(tmp_path: Path, capfd):
    """Losses are those of four ranks but for the order of sums, in fp32."""
    from megatron_moe.commands.train import train

    dense = save_dense(tmp_path / "dense", num_hidden_layers=2)
    tokens = write_tokens(tmp_path / "tokens")
    changes: dict[str, dict[str, object]] = {
        "parallel": {"expert_parallel_size": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "lr_decay_steps": 5},
    }
    expected = run_training(tree(tmp_path / "all", dense, tokens, **changes), world_size=4)
    run_training(tree(tmp_path / "run", dense, tokens, **changes, train={"steps": 2}), world_size=4)
    with pytest.raises(ConfigError, match="nearest legal layout of 2 ranks"):
        start.on_ranks(train, build(RunConfig, tree(tmp_path / "run", dense, tokens, **changes)), 2)
    changes["parallel"]["adapt_to_ranks"] = True
    start.on_ranks(train, build(RunConfig, tree(tmp_path / "run", dense, tokens, **changes)), 2)
    assert "Layout for 2 rank(s): parallel.expert_parallel_size=2\n" in capfd.readouterr().err
    losses = [line["loss/lm"] for line in read_metrics(tmp_path / "run")[-3:]]
    assert losses == pytest.approx([line["loss/lm"] for line in expected[-3:]], rel=1e-5)


def test_the_version_is_the_packages(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron-moe", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == f"megatron-moe {megatron_moe.__version__}\n"


def test_a_lost_rank_ends_with_how_to_resume():
    with (
        pytest.raises(JobError, match=r"^rank 1 died\n  run the same command$"),
        start.resumable("run the same command"),
    ):
        raise JobError("rank 1 died")
    with pytest.raises(ConfigError, match=r"^not lost$"), start.resumable("run the same command"):
        raise ConfigError("not lost")
