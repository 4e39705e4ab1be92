"""Overlap tensor-parallel communication with matrix products: Transformer Engine's user buffers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.spec import ModelSpec


def start_tp_overlap(config: RunConfig, spec: ModelSpec) -> None:
    """Allocate the buffers that `train.tp_comm_overlap` needs, before a model is built.

    CUDA only. The buffers hold one micro-batch's activations, ``(S * B / cp, D)``, and Transformer
    Engine requires exactly this shape: passes of another shape must run inside
    `without_tp_overlap`, or in a model built without the setting. Linear layers of attention and of
    dense FFNs use the buffers; experts do not.
    """
    if not config.train.tp_comm_overlap:
        return
    parallel, train = config.parallel, config.train
    tokens = config.data.seq_length * train.micro_batch_size // parallel.context_parallel_size
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    base.initialize_ub(
        shape=[tokens, spec.hidden_size],
        tp_size=parallel.tensor_parallel_size,
        dtype=OF_PRECISION[train.precision],
        bootstrap_backend="nccl",
    )


@contextlib.contextmanager
def without_tp_overlap(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Disable the buffers of ``modules`` inside a ``with`` block.

    Transformer Engine's linear layers check attributes named ub_* at every forward pass.
    """
    disabled: list[tuple[torch.nn.Module, str]] = [
        (layer, name)
        for module in modules
        for layer in module.modules()
        for name, value in vars(layer).items()
        if name.startswith(("ub_overlap_", "ub_bulk_")) and value is True
    ]
    for layer, name in disabled:
        setattr(layer, name, False)
    try:
        yield
    finally:
        for layer, name in disabled:
            setattr(layer, name, True)
