"""Compare known shapes with their parameter counts, transformers' defaults, and real folders."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from dense_models import DENSE_MODELS

from megatron_moe.errors import ConfigError
from megatron_moe.hf.known import known_model, known_models, model_named
from megatron_moe.hf.planned import spec_to_plan
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.parameters import total_parameters
from megatron_moe.planner.shape import source_shape
from research.calibration.published import model_shape

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "runs" / "models" / "smollm2-135m"

ROUNDED = {"olmo-2-1b": 1.48, "olmo-2-7b": 7.3, "olmo-2-13b": 13.7, "olmo-2-32b": 32.2}
"""Billions of parameters, where only these are known to be published."""


@pytest.mark.parametrize("model", known_models().values(), ids=lambda model: model.name)
def test_the_parameters_are_those_that_the_hub_states(model):
    counted = total_parameters(source_shape(spec_from_config(model.config, where=model.name)))
    if model.name in ROUNDED:
        assert round(counted / 1e9, 2 if counted < 2e9 else 1) == ROUNDED[model.name]
        return
    if model.parameters is None:
        assert model.name in ("dense-56x6144", "qwen2-57b-a14b")
        pytest.skip("no published count is known")
    assert counted == model.parameters


@pytest.mark.parametrize("model", known_models().values(), ids=lambda model: model.name)
def test_a_known_model_is_one_that_a_run_can_start_from(model):
    spec = spec_from_config(model.config, where=model.name)
    assert spec.eos_token_id is not None or spec.experts is not None
    if spec.rope_scaling is not None:
        assert spec.rope_scaling.original_max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("name", "model_type", "same"),
    [
        # transformers' defaults are these models.
        ("mistral-7b-v0.1", "mistral", ("vocab_size", "sliding_window")),
        ("mixtral-8x7b", "mixtral", ("vocab_size", "num_local_experts", "num_experts_per_tok")),
        (
            "qwen1.5-moe-a2.7b",
            "qwen2_moe",
            ("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok"),
        ),
    ],
)
def test_the_defaults_of_transformers_are_these_models(name: str, model_type: str, same: tuple):
    defaults = transformers.AutoConfig.for_model(model_type).to_dict()
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    ours = model_named(name).config
    for key in (*sizes, *same):
        assert ours[key] == defaults[key], key


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm2-135m"])
def test_transformers_builds_a_model_of_as_many_parameters(name: str):
    model = model_named(name)
    config = transformers.AutoConfig.for_model(
        {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}[
            model.config["architectures"][0]
        ],
        **{key: value for key, value in model.config.items() if key != "architectures"},
    )
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    assert built.num_parameters() == model.parameters


@pytest.mark.parametrize("name", sorted(DENSE_MODELS))
def test_the_models_of_configs_are_known(name: str):
    model = known_model(name)
    assert model is not None
    expected, known = (spec_from_config(c) for c in (DENSE_MODELS[name], model.config))
    for size in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                 "num_query_groups", "kv_channels", "vocab_size", "tied_embeddings"):  # fmt: skip
        assert getattr(known, size) == getattr(expected, size), size


@pytest.mark.parametrize("name", ["mixtral-8x22b", "qwen2-57b-a14b"])
def test_the_moe_models_are_those_of_the_published_rows(name: str):
    tree = yaml.safe_load((ROOT / "research/calibration/published_mfu.yaml").read_text())
    published = model_shape(tree["models"][name])
    known = source_shape(spec_from_config(model_named(name).config))
    for size in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups",
                 "vocab_size", "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size",
                 "shared_expert_size"):  # fmt: skip
        assert getattr(known, size) == getattr(published, size), size


@pytest.mark.skipif(not DEMO_MODEL.exists(), reason="make demo has not fetched the model")
def test_the_demo_model_has_its_known_shape():
    real = spec_from_config(json.loads((DEMO_MODEL / "config.json").read_text()))
    known = spec_from_config(model_named("smollm2-135m").config)
    ids = {"eos_token_id", "bos_token_id"}  # the demo's is the instruction-tuned model
    assert {name: getattr(real, name) for name in real.__slots__ if name not in ids} == {
        name: getattr(known, name) for name in known.__slots__ if name not in ids
    }


@pytest.mark.parametrize(
    "name",
    ["llama-3-8b", "LLAMA-3-8B", "meta-llama/Meta-Llama-3-8B", "models/Meta-Llama-3-8B/"],
)
def test_a_model_is_known_by_several_names(name: str):
    assert model_named(name).name == "llama-3-8b"


def test_an_unknown_name_lists_similar_ones():
    with pytest.raises(ConfigError, match=r"similar names: llama-3-8b, .*\n  known: llama-2-7b"):
        model_named("lama-3-8")


def test_a_folder_that_exists_counts_more_than_its_name(tmp_path: Path):
    folder = tmp_path / "Meta-Llama-3-8B"
    spec, note = spec_to_plan(folder)
    assert (spec.num_layers, spec.hidden_size) == (32, 4096)
    assert note is not None
    assert note.startswith(f"{folder} does not exist")
    folder.mkdir()
    config = {**model_named("llama-3-8b").config, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    spec, note = spec_to_plan(folder)
    assert (spec.num_layers, note) == (2, None)
