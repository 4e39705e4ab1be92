"""Tests of Megatron-Core's settings, and of errors for missing kernels."""

from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config.judging import dense_config, judging
from megatron_moe.config.load import build
from megatron_moe.config.moe import Moe
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.model.config import (
    check_dispatcher,
    check_engine,
    transformer_settings,
    without_fp8,
)
from megatron_moe.runtime.engine import TORCH_ON_CPU, TORCH_ON_CUDA, TRANSFORMER_ENGINE, Engine

SPEC = spec_from_config(
    {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8,
     "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
)  # fmt: skip


REFUSED = "by a rule, so it is never asked for"
ENGINES = [TORCH_ON_CPU, TORCH_ON_CUDA, TRANSFORMER_ENGINE]


def config_of(moe: dict[str, Any], **train: Any) -> RunConfig:
    tree = {"run": {"dir": "run"}, "source": {"path": "dense"},
            "moe": {"num_moe_experts": 4, **moe}, "data": {"path": "text"},
            "train": {"steps": 1, **train}}  # fmt: skip
    return build(RunConfig, tree)


def settings_of(engine: Engine, **train: Any) -> dict[str, Any]:
    return transformer_settings(config_of({}, **train), SPEC, engine=engine)


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
@pytest.mark.parametrize(
    ("engine", "missing"),
    [(TORCH_ON_CPU, "a CUDA device"), (TORCH_ON_CUDA, "the package deep_ep")],
)
def test_a_dispatcher_without_its_kernels_is_refused_by_name(backend, engine, missing: str):
    moe = Moe(num_moe_experts=4, moe_token_dispatcher_type="flex",
              moe_flex_dispatcher_backend=backend)  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{backend}\) needs {missing}") as caught:
        check_dispatcher(moe, engine)
    assert "\n  set moe.moe_token_dispatcher_type=alltoall" in str(caught.value)
    check_dispatcher(Moe(num_moe_experts=4), engine)


@pytest.mark.parametrize(
    ("what", "modules"),
    [
        ("none", [None, None, None]),
        ("selective", [["core_attn"], REFUSED, ["layernorm", "moe_act"]]),
        ("moe", [["moe"], ["moe"], ["layernorm", "moe"]]),
        ("full", [None, None, None]),
    ],
)
def test_recomputed_modules_follow_the_engine(what: str, modules: list):
    for engine, expected in zip(ENGINES, modules, strict=True):
        if expected == REFUSED:
            continue
        settings = settings_of(engine, recompute=what)
        granularity = {"none": None, "moe": "selective"}.get(what, what)
        assert settings.get("recompute_granularity") == granularity
        assert settings.get("recompute_modules") == expected


FUSIONS_OF_TRANSFORMER_ENGINE = (
    "apply_rope_fusion", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion",
    "gradient_accumulation_fusion",
)  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine.name}-{engine.device}")
def test_fusions_are_those_the_engine_has(engine: Engine):
    settings = settings_of(engine)
    for name in FUSIONS_OF_TRANSFORMER_ENGINE:
        assert settings.get(name, False) == (not engine.is_torch), name
    assert settings["use_cpu_initialization"] == (not engine.on_cuda)
    assert settings["bias_activation_fusion"] == engine.on_cuda  # compiled by Megatron-Core
    if engine.is_torch:  # Megatron-Core rejects the others if they are not installed
        TransformerConfig(**settings)


def test_gradients_are_added_in_place_unless_the_setting_is_off():
    off = settings_of(TRANSFORMER_ENGINE, gradient_accumulation_fusion=False)
    assert not off["gradient_accumulation_fusion"]


def test_tp_overlap_is_a_setting_of_transformer_engine():
    assert settings_of(TRANSFORMER_ENGINE, tp_comm_overlap=True)["tp_comm_overlap"]
    assert not settings_of(TRANSFORMER_ENGINE)["tp_comm_overlap"]
    for engine in (TORCH_ON_CPU, TORCH_ON_CUDA):
        assert "tp_comm_overlap" not in settings_of(engine, tp_comm_overlap=True)


def test_fp8_is_a_setting_of_transformer_engine():
    fp8 = {"fp8": "hybrid", "fp8_recipe": "blockwise"}
    assert fp8.items() <= settings_of(TRANSFORMER_ENGINE, **fp8).items()
    for engine in (TORCH_ON_CPU, TORCH_ON_CUDA):
        assert not fp8.keys() & settings_of(engine, **fp8).keys()
    assert not fp8.keys() & settings_of(TRANSFORMER_ENGINE).keys()


def test_the_shared_expert_is_overlapped_on_cuda_only():
    overlap = {"moe_shared_expert_overlap": True}
    for engine in ENGINES:
        settings = transformer_settings(config_of(overlap), SPEC, engine=engine)
        assert settings.get("moe_shared_expert_overlap", False) == engine.on_cuda


def test_the_exchange_overlaps_on_every_engine_and_weight_gradients_are_delayed_on_one():
    asked = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
    for engine in ENGINES:
        settings = settings_of(engine, **asked)
        assert settings["overlap_moe_expert_parallel_comm"]
        assert settings.get("delay_wgrad_compute", False) == (not engine.is_torch)
        assert not asked.keys() & settings_of(engine).keys()


def test_commands_without_a_backward_pass_do_not_overlap_the_exchange():
    asked = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
    config = config_of({}, **asked)
    for other in (judging(config, 2), dense_config(config)):
        assert not any(getattr(other.train, name) for name in asked)


@pytest.mark.parametrize(
    ("moe", "train", "named"),
    [
        (
            {},
            {"delay_wgrad_compute": True},
            r"train.delay_wgrad_compute \(True\) needs Transformer Engine",
        ),
        ({}, {"fp8": "hybrid"}, r"train.fp8 \(hybrid\) needs Transformer Engine"),
        ({}, {"tp_comm_overlap": True}, r"train.tp_comm_overlap \(True\) needs Transformer"),
        (
            {"moe_shared_expert_overlap": True},
            {},
            r"moe_shared_expert_overlap \(True\) needs a GPU",
        ),
    ],
)
def test_a_setting_that_the_chosen_engine_lacks_is_refused(
    moe: dict[str, Any], train: dict[str, Any], named: str
):
    """``run.engine: auto`` may resolve to an engine that would ignore it."""
    config = config_of(moe, **train)
    with pytest.raises(ConfigError, match=named):
        check_engine(config, TORCH_ON_CPU)
    check_engine(config, TRANSFORMER_ENGINE)
    if train:
        with pytest.raises(ConfigError, match=named):
            check_engine(config, TORCH_ON_CUDA)


def test_layers_compute_in_bf16_where_fp8_is_off():
    transformer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    transformer.fp8 = "hybrid"
    with without_fp8(transformer):
        assert transformer.fp8 is None
    assert transformer.fp8 == "hybrid"
