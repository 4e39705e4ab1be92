"""Rows 10, 15, 38: a resume says what changed, counts on, and needs only the run's folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import save_dense, save_tokenizer
from training_runs import read_metrics, run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import newest, read_config
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.commands.resuming import change_table, changed_settings, with_source
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.data.stream import fingerprint
from megatron_moe.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, library_files: list[Path]) -> Path:
    """Train two steps from a source with odd neighbors, and return the folder of all parts."""
    root = tmp_path_factory.mktemp("resuming")
    save_tokenizer(root / "dense", library_files[:5])
    save_dense(root / "dense", vocab_size=600)
    (root / "dense" / "tokenizer_old").mkdir()  # row 15
    (root / "dense" / "tokenizer_old" / "tokenizer.json").write_text("{}")
    (root / "dense" / "tokenizer_link").symlink_to(root / "nowhere")
    run_training(settings(root), world_size=1)
    return root


def settings(root: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    tokens = root / "tokens"
    if not Path(f"{tokens}.idx").exists():
        write_tokens(tokens)
    steps = {"steps": 2, "global_batch_size": 4, "precision": "fp32"}
    return tree(root / "run", root / "dense", tokens, train={**steps, **changes.pop("train", {})},
                **changes)  # fmt: skip


def test_neighbors_of_the_tokenizer_do_not_prevent_saves(finished: Path):
    checkpoint = newest(finished / "run")
    assert checkpoint is not None
    names = {path.name for path in (checkpoint / "source").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not any(name.startswith(("tokenizer_old", "tokenizer_link")) for name in names)


@pytest.mark.distributed
def test_a_resume_needs_no_source_and_counts_on(finished: Path, tmp_path: Path):
    root = shutil.copytree(finished, tmp_path / "moved", symlinks=True)
    shutil.rmtree(root / "dense")
    changes: dict[str, Any] = {"data": {"seq_length": 64}, "optimizer": {"lr": 5e-4},
                               "train": {"steps": 4}}  # fmt: skip
    wanted = settings(root, **changes)
    wanted["source"]["path"] = str(with_source(build(RunConfig, wanted)).source.path)
    lines = run_training(wanted, world_size=1)
    # Two steps of 4 x 32 tokens, then two of 4 x 64: the counter never goes back.
    assert [line["tokens/seen"] for line in lines if line["step"]] == [128, 256, 512, 768]
    (record,) = map(json.loads, (root / "run" / "resumed.jsonl").read_text().splitlines())
    changed = {change["name"]: (change["before"], change["now"]) for change in record["changes"]}
    assert changed["data.seq_length"] == (32, 64)
    assert changed["optimizer.lr"] == (1e-3, 5e-4)
    assert changed["train.steps"] == (2, 4)
    assert record["step"] == 2
    export_checkpoint(root / "run", root / "hf")
    assert (root / "hf" / "tokenizer.json").exists()


@pytest.mark.distributed
def test_changed_content_and_a_finished_run_are_logged(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    root = shutil.copytree(finished, tmp_path / "moved", symlinks=True)
    before = fingerprint(root / "tokens")
    write_tokens(root / "tokens", seed=1)  # the same name and size, other words
    assert fingerprint(root / "tokens") != before
    run_training(settings(root), world_size=1)
    out = capfd.readouterr().out
    assert "This run is finished: it has taken all 2 steps" in out
    assert "takes effect: the content has changed" in out
    assert len([line for line in read_metrics(root / "run") if line["step"]]) == 2


def config(**changes: dict[str, Any]) -> RunConfig:
    return build(RunConfig, tree(Path("run"), Path("dense"), Path("tokens"), **changes))


REFUSED: dict[str, dict[str, Any]] = {
    "moe.moe_router_topk": {"moe": {"moe_router_topk": 1}},
    "moe.router_order": {"moe": {"router_order": "softmax_topk"}},
    "moe.num_moe_experts": {"moe": {"num_moe_experts": 8}},
    "moe.moe_layers": {"moe": {"moe_layers": [0]}},
    "moe.moe_router_score_function": {"moe": {"moe_router_score_function": "sigmoid"}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_continue_is_refused(name: str):
    with pytest.raises(ConfigError, match=rf"(?s){name} \(.*was .*new run in another run\.dir"):
        changed_settings(config(), config(**REFUSED[name]), step=3)


def test_a_refusal_lists_the_other_changes_too():
    """A user who must undo one change sees the others before the next try."""
    now = config(moe={"moe_router_topk": 1}, optimizer={"lr": 1e-2}, run={"seed": 7})
    with pytest.raises(ConfigError) as caught:
        changed_settings(config(), now, step=3)
    table = str(caught.value).partition("Changed since the checkpoint of step 3:")[2].splitlines()
    rows = {line.split()[0]: line for line in table if line.strip()}
    assert rows.keys() == {"setting", "run.seed", "moe.moe_router_topk", "optimizer.lr"}
    assert rows["moe.moe_router_topk"].endswith("refused")
    assert rows["optimizer.lr"].endswith("takes effect")


@pytest.mark.parametrize(
    ("changes", "name", "effect"),
    [
        ({"optimizer": {"lr": 1e-2}}, "optimizer.lr", "takes effect"),
        ({"run": {"seed": 7}}, "run.seed", "shuffled anew"),
        ({"data": {"seq_length": 64}}, "data.seq_length", "cut anew"),
        ({"data": {"path": "other"}}, "data.path", "continues on this text"),
        ({"source": {"path": "other"}}, "source.path", "no effect"),
        ({"upcycle": {"verify": "always"}}, "upcycle.verify", "no effect"),
        ({"parallel": {"tensor_parallel_size": 2}}, "parallel.tensor_parallel_size",
         "takes effect"),
        ({"moe": {"moe_aux_loss_coeff": 0.5}}, "moe.moe_aux_loss_coeff", "takes effect"),
    ],
)  # fmt: skip
def test_what_changed_is_in_the_table(changes: dict[str, Any], name: str, effect: str):
    (change,) = changed_settings(config(), config(**changes), step=3)
    assert change.name == name
    assert effect in change.effect
    assert name in change_table([change], step=3)


def test_the_message_without_changes():
    assert changed_settings(config(), config(), step=3) == []
    assert change_table([], step=3) == "No setting has changed since the checkpoint"


def test_a_new_run_without_a_source_is_refused(tmp_path: Path):
    from megatron_moe.hf.spec import read_spec

    wanted = build(RunConfig, tree(tmp_path / "run", tmp_path / "gone", tmp_path / "tokens"))
    assert with_source(wanted) == wanted
    with pytest.raises(UserError, match="cannot read"):
        read_spec(wanted.source.path)


def test_the_checkpoint_keeps_the_settings(finished: Path):
    checkpoint = newest(finished / "run")
    assert checkpoint is not None
    assert read_config(checkpoint).train.steps == 2
