"""Tensor-parallel communication beside the products it feeds: Transformer Engine's user buffers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import DenseSpec
from megatron_moe.model.config import DTYPES


def start_tp_overlap(config: RunConfig, spec: DenseSpec) -> None:
    """Allocate the buffers that `train.tp_comm_overlap` needs, before a model is built.

    On CUDA alone. They hold one micro-batch's activations, ``(S * B / cp, D)``, and Transformer
    Engine takes exactly as many: passes of another shape run inside `without_tp_overlap`, or in a
    model built without the setting. Linear layers of attention and of dense FFNs use them, experts
    do not.
    """
    if not config.train.tp_comm_overlap:
        return
    parallel, train = config.parallel, config.train
    tokens = config.data.seq_length * train.micro_batch_size // parallel.context_parallel_size
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    base.initialize_ub(
        shape=[tokens, spec.hidden_size],
        tp_size=parallel.tensor_parallel_size,
        dtype=DTYPES[train.precision],
        bootstrap_backend="nccl",
    )


@contextlib.contextmanager
def without_tp_overlap(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let ``modules`` gather and scatter without buffers for the length of a ``with`` block.

    Transformer Engine's linear layers decide at every forward pass, by attributes named ub_*.
    """
    off: list[tuple[torch.nn.Module, str]] = [
        (layer, name)
        for module in modules
        for layer in module.modules()
        for name, value in vars(layer).items()
        if name.startswith(("ub_overlap_", "ub_bulk_")) and value is True
    ]
    for layer, name in off:
        setattr(layer, name, False)
    try:
        yield
    finally:
        for layer, name in off:
            setattr(layer, name, True)
