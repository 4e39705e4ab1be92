"""What Megatron-Core takes from Transformer Engine or Apex, and what the torch engine gives it.

==========================================  ==================================================
FusedAdam of Apex or Transformer Engine     `FusedAdamW`, with the same state layout
Apex's product that adds to a buffer        `gradients.py`
rotary embedding in several passes          `shortcuts.rotate`
==========================================  ==================================================

On a CPU, `cpu.install` replaces what Megatron-Core hard-codes to CUDA besides.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

_installed = False


def install_torch_engine() -> None:
    """Make Megatron-Core use torch's kernels in this process; calling it again does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import distrib_optimizer

    from megatron_moe.device import gradients, shortcuts
    from megatron_moe.device.adamw import FusedAdamW

    megatron_optimizer.Adam = FusedAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    rope_utils._apply_rotary_pos_emb_bshd = shortcuts.rotate
    _add_gradients_in_products()
    param_and_grad_buffer._ParamAndGradBuffer.reset = gradients.reset
    _zero_stale_before_communication(param_and_grad_buffer._ParamAndGradBucketGroup)


def install_for_transformer_engine() -> None:
    """Replace Apex's kernel where Apex is not installed.

    Transformer Engine's linear layers add gradients to their buffers themselves, but the output
    layer is Megatron-Core's and asks for Apex.
    """
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        _add_gradients_in_products()


def _add_gradients_in_products() -> None:
    from megatron.core.tensor_parallel import layers

    from megatron_moe.device import gradients

    layers.fused_weight_gradient_mlp_cuda = gradients
    layers._grad_accum_fusion_available = True


def _zero_stale_before_communication(bucket_group: Any) -> None:
    from megatron_moe.device.gradients import zero_stale

    start = bucket_group.start_grad_sync

    @functools.wraps(start)
    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> None:
        zero_stale(self.params)
        start(self, *args, **kwargs)

    bucket_group.start_grad_sync = start_grad_sync
