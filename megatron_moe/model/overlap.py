"""Tensor-parallel communication beside the products it feeds: Transformer Engine's user buffers."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import DenseSpec
from megatron_moe.model.config import DTYPES


def start_tp_overlap(config: RunConfig, spec: DenseSpec) -> None:
    """Allocate the buffers that `train.tp_comm_overlap` needs, before a model is built.

    On CUDA alone. They hold one micro-batch's activations, ``(S * B / cp, D)``; linear layers of
    attention and of dense FFNs use them, experts do not.
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
