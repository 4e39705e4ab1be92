"""Test ``--check``, ``flops`` and their output."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_models import DENSE_MODELS, H100_FILES, shipped
from rich.console import Console
from typer.testing import CliRunner

from megatron_moe.cli.main import app
from megatron_moe.config.load import dump
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.planner.check import check_layout
from megatron_moe.planner.count import count
from megatron_moe.planner.drawing import draw, spans
from megatron_moe.planner.parameters import total_parameters
from megatron_moe.planner.search import search
from megatron_moe.planner.tables import check_report, counts_report, search_report, short_layout
from megatron_moe.planner.workload import Degrees

PAPER = {
    "context_parallel_size": 2,
    "pipeline_parallel_size": 4,
    "virtual_pipeline_parallel_size": 8,
    "expert_parallel_size": 8,
}


def printed(report, *, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), soft_wrap=True)  # as the program's own
    console.print(report)
    return console.file.getvalue()


def test_a_good_layout(make_config, llama3_spec):
    result = check_layout(make_config(**PAPER), llama3_spec, gpus=128)
    assert result.legal
    assert result.fits
    assert result.reasons == ()
    tree = json.loads(json.dumps(result.to_json()))
    assert tree["mfu"] == pytest.approx(46.8, abs=3)
    assert tree["tokens_per_second_per_gpu"] > 4000
    parts = {k: v for k, v in tree["memory_gib"].items() if k != "total"}
    assert sum(parts.values()) == pytest.approx(tree["memory_gib"]["total"])
    assert "matrix products" in printed(check_report(result))


def test_dropped_choices_are_named(make_config, llama3_spec):
    """Half of the choices do not fit into half of the mean; MFU counts them all the same."""
    half = {"moe_expert_capacity_factor": 0.5}
    text = printed(
        check_report(check_layout(make_config(moe=half, **PAPER), llama3_spec, gpus=128))
    )
    assert "At least 50% of the routed choices are dropped" in text
    text = printed(check_report(check_layout(make_config(**PAPER), llama3_spec, gpus=128)))
    assert "dropped" not in text


def test_an_illegal_layout_has_reasons_and_no_numbers(make_config, llama3_spec):
    result = check_layout(make_config(tensor_parallel_size=3), llama3_spec, gpus=128)
    assert not result.legal
    assert "parallel.tensor_parallel_size" in "\n".join(result.reasons)
    assert result.to_json()["mfu"] is None
    assert "not legal" in printed(check_report(result))


def test_a_layout_that_does_not_fit_reports_the_excess(make_config, llama3_spec):
    result = check_layout(make_config(expert_parallel_size=8), llama3_spec, gpus=8)
    assert result.legal
    assert not result.fits
    assert "GiB too many" in result.reasons[0]
    assert "largest parts, GiB: optimizer" in result.reasons[0]


def test_advice_names_one_change_that_is_faster(make_config, llama3_spec):
    unchunked = {k: v for k, v in PAPER.items() if k != "virtual_pipeline_parallel_size"}
    result = check_layout(make_config(**unchunked), llama3_spec, gpus=128)
    assert result.advice[0].startswith("vpp 8:")


def test_a_shared_expert_counts(make_config, llama3_spec, llama3_e8t2):
    shared = replace(llama3_e8t2, shared_expert_size=1024)
    grown = total_parameters(shared) - total_parameters(llama3_e8t2)
    assert grown == 32 * 3 * 4096 * 1024


def test_search_prints_layouts_and_their_placement(make_config, llama3_spec):
    text = printed(search_report(search(make_config(), llama3_spec, gpus=128)))
    for word in ("tokens/s", "limited by", "faster, does not fit", "node 0", "NVLink"):
        assert word in text


@pytest.mark.parametrize("name", ["3.2-3b-e8t2-8", "3-8b-e64t8-granular-128", "3-70b-e8t2-1024"])
def test_the_search_is_readable_on_80_columns(name: str):
    (path,) = [path for path in H100_FILES if path.stem == f"llama{name}"]
    config, spec, gpus = shipped(path)
    result = search(config, spec, gpus=gpus)
    lines = printed(search_report(result), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\u2026" in line for line in lines), "nothing is cut off"
    for one in result.best:  # in one row; a layout of many degrees goes on in the next
        row = [short_layout(one.degrees)[:20], f"{one.time.mfu:.1f}", f"{one.memory.total:.1f}"]
        assert any(all(cell in line for cell in row) for line in lines), row


@pytest.mark.parametrize(("gpus", "status"), [(128, 0), (96, 1)])
def test_check_ends_with_status_1_if_the_layout_is_illegal(
    make_config, tmp_path, gpus: int, status: int
):
    (tmp_path / "config.json").write_text(json.dumps(DENSE_MODELS["Meta-Llama-3-8B"]))
    config = make_config(**PAPER)
    source = config.source.model_copy(update={"path": tmp_path})
    (tmp_path / "run.yaml").write_text(dump(config.model_copy(update={"source": source})))
    words = ["plan", str(tmp_path / "run.yaml"), "--check", "--gpus", str(gpus)]
    for form in ([], ["--json"]):
        result = CliRunner().invoke(app, [*words, *form])
        assert result.exit_code == status, result.output
    assert json.loads(result.stdout)["legal"] == (status == 0)


def test_count_of_a_folder_with_only_a_config(tmp_path, llama2_config):
    (tmp_path / "config.json").write_text(json.dumps(llama2_config))
    counts = count(tmp_path)
    assert (counts.sequence_length, counts.total_parameters) == (4096, 6_738_415_616)
    assert f"{counts.forward_flops / 1e12:.1f}" == "62.9"
    assert counts.training_flops == 3 * counts.forward_flops
    assert count(tmp_path / "config.json", sequence_length=2048).sequence_length == 2048
    assert "62.9 TFLOP" in printed(counts_report(counts))
    assert {"forward_flops", "training_flops", "total_parameters", "active_parameters"} <= set(
        counts.to_json()
    )


def test_count_of_a_run(tmp_path, make_config, llama3_config):
    (tmp_path / "config.json").write_text(json.dumps(llama3_config))
    config = make_config()
    config = config.model_copy(
        update={"source": config.source.model_copy(update={"path": tmp_path})}
    )
    (tmp_path / "run.yaml").write_text(dump(config))
    counts = count(tmp_path / "run.yaml")
    assert f"{counts.total_parameters / 1e9:.1f}" == "47.5"
    assert f"{counts.training_flops:.3e}" == "7.515e+14"


def test_count_of_mixtral(tmp_path, llama2_config):
    mixtral = llama2_config | {
        "architectures": ["MixtralForCausalLM"], "intermediate_size": 14336,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    counts = count(tmp_path)
    assert counts.total_parameters == 46_702_792_704  # mistralai/Mixtral-8x7B-v0.1
    assert counts.active_parameters == 12_879_925_248


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3", "qwen2"])
def test_count_agrees_with_hugging_face(model_type, tmp_path):
    """Compare with the number of parameters that transformers builds from the same config.json."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=3, vocab_size=1000)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert count(tmp_path).total_parameters == model.num_parameters()


def test_count_rejects_missing_and_incomplete_files(tmp_path):
    with pytest.raises(ConfigError, match="neither a Hugging Face folder nor"):
        count(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"nor the name of a known model.\n  similar names: .*"):
        count(Path("llama3-8"))
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        count(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(CheckpointError, match="num_attention_heads is missing"):
        count(tmp_path)


def test_spans_report_which_groups_cross_nodes():
    by_axis = {s.axis: s for s in spans(Degrees(gpus=128, tp=2, pp=8, ep=8, etp=2))}
    assert (by_axis["tp"].nodes, by_axis["tp"].link) == (1, "NVLink")
    assert (by_axis["ep"].nodes, by_axis["ep"].link) == (2, "network")
    assert by_axis["cp"].link == "-"


def test_a_drawing_shows_whole_nodes():
    text = draw(Degrees(gpus=32, tp=4, pp=2, ep=8))
    assert text.count("node ") == 2
    assert "... 4 nodes, 2 to a pipeline stage" in text
