"""All replacements in torch and Megatron-Core, and what happens if an attribute is gone."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.random import _set_cuda_rng_state

from megatron_moe.errors import ConfigError
from megatron_moe.runtime import patches
from megatron_moe.runtime.patches import PatchError, check_megatron_version, replace

CUDA = (
    "current_device", "device_count", "is_available", "set_device", "synchronize", "empty_cache",
    "Stream", "Event", "current_stream", "default_stream", "stream", "get_rng_state",
    "set_rng_state", "manual_seed", "_lazy_call", "memory_allocated", "max_memory_allocated",
    "random.get_rng_state", "random.set_rng_state",
)  # fmt: skip
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")
METHODS = (
    "Tensor.to", "Tensor.type", "Tensor.cuda", "Tensor.record_stream",
    "nn.modules.module.Module.cuda",
)  # fmt: skip
COLLECTIVES = (
    "all_to_all_single", "all_gather", "reduce_scatter", "all_gather_into_tensor",
    "reduce_scatter_tensor",
)  # fmt: skip
TORCH_ENGINE = (
    "optimizer.Adam",
    "optimizer.USING_PYTORCH_OPTIMIZER",
    "optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
    "optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
    "optimizer.clip_grads.l2_norm_impl",
    "models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd",
    "transformer.moe.token_dispatcher.sort_chunks_by_idxs",
    "tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
    "tensor_parallel.layers._grad_accum_fusion_available",
    "distributed.param_and_grad_buffer._ParamAndGradBuffer.reset",
    "distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync",
)
ON_CPU = [
    *(f"torch.cuda.{name}" for name in CUDA),
    *(f"torch.{name}" for name in (*FACTORIES, *METHODS)),
    *(f"torch.distributed.{name}" for name in COLLECTIVES),
    *(f"megatron.core.{name}" for name in TORCH_ENGINE),
]


def test_all_replacements_on_a_cpu_are_listed():
    """A new one is added here too, so that nobody has to search for it."""
    assert patches.REPLACED[: len(ON_CPU)] == ON_CPU


def test_calls_that_wait_for_cuda_do_not_pile_up():
    """Megatron-Core makes two per layer and step, and torch keeps a stack trace with each."""
    waiting = len(torch.cuda._queued_calls)
    _set_cuda_rng_state(torch.get_rng_state())
    assert len(torch.cuda._queued_calls) == waiting


def test_an_attribute_that_is_gone_is_an_error():
    """Without the check, the assignment would create a name that nobody reads."""
    module = SimpleNamespace(__name__="megatron.core.renamed", kept=1)
    with pytest.raises(PatchError, match=r"megatron\.core\.renamed\.gone does not exist"):
        replace(module, "gone", 2)
    replace(module, "gone", 2, optional=True)
    assert module.gone == 2


@pytest.mark.parametrize("version", ["0.18.0", "0.20.0", "1.0"])
def test_an_untested_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(patches.importlib.metadata, "version", lambda name: version)
    with pytest.raises(ConfigError) as caught:
        check_megatron_version()
    assert str(caught.value) == (
        f"megatron-core ({version}) must be a version <0.20,>=0.19.2: this package replaces some "
        "of its internal functions.\n  pip install 'megatron-core>=0.19.2,<0.20'"
    )


def test_the_installed_megatron_core_is_accepted():
    check_megatron_version()
