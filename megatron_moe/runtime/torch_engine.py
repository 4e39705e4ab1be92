"""Replace functions that Megatron-Core takes from Apex or Transformer Engine, or that are slow.

::

    Apex's or Transformer Engine's FusedAdam             `FusedAdamW`, with the same state layout
    Apex's product that adds to a gradient buffer        `gradients`
    the norm of all gradients                            `shortcuts.l2_norm`
    rotary embedding, sorting of chunks                  `shortcuts`
    permutation of tokens by expert, and back            `permute`, on CUDA

Megatron-Core must be imported first.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

from megatron_moe.runtime.patches import check_megatron_version, replace

_installed = False


def install_torch_engine(*, cuda: bool) -> None:
    """Replace these functions of Megatron-Core in this process; a second call does nothing.

    Args:
        cuda: Also replace functions whose replacement is faster or different only on CUDA.
    """
    global _installed
    if _installed:
        return
    _installed = True
    check_megatron_version()
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_moe.runtime import gradients, shortcuts
    from megatron_moe.runtime.adamw import FusedAdamW

    replace(megatron_optimizer, "Adam", FusedAdamW)
    replace(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
    replace(clip_grads, "l2_norm_impl", shortcuts.l2_norm)
    replace(rope_utils, "_apply_rotary_pos_emb_bshd", shortcuts.rotate)
    replace(token_dispatcher, "sort_chunks_by_idxs", shortcuts.sort_chunks)
    _add_gradients_in_products()
    replace(param_and_grad_buffer._ParamAndGradBuffer, "reset", gradients.reset)
    _zero_stale_before_communication(param_and_grad_buffer._ParamAndGradBucketGroup)
    if cuda:
        from megatron_moe.runtime import permute

        permute.install()


def use_fused_adamw() -> None:
    """Make Megatron-Core use `FusedAdamW` with any engine, for moments that are kept apart.

    Transformer Engine's FusedAdam keeps the same state in fp32 on the GPU.
    """
    import megatron.core.optimizer as megatron_optimizer

    from megatron_moe.runtime.adamw import FusedAdamW

    if megatron_optimizer.Adam is not FusedAdamW:
        replace(megatron_optimizer, "Adam", FusedAdamW)


def install_for_transformer_engine() -> None:
    """Replace Apex's kernel if Apex is not installed.

    Transformer Engine's linear layers add gradients to their buffers themselves, but the output
    layer is Megatron-Core's and requires Apex.
    """
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        _add_gradients_in_products()


def _add_gradients_in_products() -> None:
    from megatron.core.tensor_parallel import layers

    from megatron_moe.runtime import gradients

    replace(layers, "fused_weight_gradient_mlp_cuda", gradients, optional=True)
    replace(layers, "_grad_accum_fusion_available", True)


def _zero_stale_before_communication(bucket_group: Any) -> None:
    from megatron_moe.runtime.gradients import zero_stale

    start = bucket_group.start_grad_sync

    @functools.wraps(start)
    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> None:
        zero_stale(self.params)
        start(self, *args, **kwargs)

    replace(bucket_group, "start_grad_sync", start_grad_sync)
