"""Settings as Megatron-Core is told them, and kernels that are not there refused by name."""

from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.load import build
from megatron_moe.config.run import Moe, RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.model import config as model_config
from megatron_moe.model.config import check_dispatcher, transformer_settings

SPEC = spec_from_config(
    {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8,
     "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
)  # fmt: skip


def told(*, cuda: bool, **train: Any) -> dict[str, Any]:
    tree = {"run": {"dir": "run"}, "dense": {"path": "dense"}, "moe": {"num_moe_experts": 4},
            "data": {"path": "text"}, "train": {"steps": 1, **train}}  # fmt: skip
    return transformer_settings(build(RunConfig, tree), SPEC, cuda=cuda)


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
@pytest.mark.parametrize(
    ("cuda", "missing"), [(False, "a CUDA device"), (True, "the package deep_ep")]
)
def test_a_dispatcher_without_its_kernels_is_refused_by_name(backend, cuda: bool, missing: str):
    moe = Moe(num_moe_experts=4, moe_token_dispatcher_type="flex",
              moe_flex_dispatcher_backend=backend)  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{backend}\) needs {missing}") as caught:
        check_dispatcher(moe, cuda=cuda)
    assert "\n  set moe.moe_token_dispatcher_type=alltoall" in str(caught.value)
    check_dispatcher(Moe(num_moe_experts=4), cuda=cuda)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    ("what", "granularity", "on_cpu", "on_cuda"),
    [
        ("none", None, None, None),
        ("selective", "selective", ["core_attn"], ["layernorm", "moe_act"]),
        ("moe", "selective", ["moe"], ["layernorm", "moe"]),
        ("full", "full", None, None),
    ],
)
def test_recompute_is_what_its_name_says(what, granularity, on_cpu, on_cuda, cuda: bool):
    found = told(cuda=cuda, recompute=what)
    assert found.get("recompute_granularity") == granularity
    assert found.get("recompute_modules") == (on_cuda if cuda else on_cpu)


def test_fusion_needs_apex_and_the_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_config, "find_spec", lambda name: Path(name))
    assert told(cuda=True)["gradient_accumulation_fusion"]
    assert not told(cuda=True, gradient_accumulation_fusion=False)["gradient_accumulation_fusion"]
    assert not told(cuda=False)["gradient_accumulation_fusion"]
    monkeypatch.setattr(model_config, "find_spec", lambda name: None)
    assert not told(cuda=True)["gradient_accumulation_fusion"]


def test_tp_overlap_is_asked_for_on_cuda_alone():
    assert told(cuda=True, tp_comm_overlap=True)["tp_comm_overlap"]
    assert not told(cuda=True)["tp_comm_overlap"]
    assert "tp_comm_overlap" not in told(cuda=False, tp_comm_overlap=True)
