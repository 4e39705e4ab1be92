"""Compare the logits of the upcycled model and the dense model on real text.

Shape letters of this module:

    S  tokens of the text (s: this cp rank's part)   V  vocabulary (v: this tp rank's part)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.hf.load import load_model
from megatron_moe.model.build import Model
from megatron_moe.model.config import without_fp8
from megatron_moe.model.loss import make_output_processor
from megatron_moe.parallel.sequence import zigzag
from megatron_moe.parallel.shards import ShardIndex, padded_vocabulary

MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Agreement:
    """Difference between the logits of the MoE and of the dense model."""

    max_logit_error: float
    argmax_agreement: float
    """Fraction of positions at which both models predict the same next token."""
    tokens: int


def verify_length(seq_length: int, *, tp: int, cp: int) -> int:
    """Return the number of tokens to compare: at most about `MAX_TOKENS`, divisible by 2 cp tp."""
    unit = 2 * cp * tp
    return min(seq_length, max(unit, MAX_TOKENS // unit * unit))


@torch.no_grad()
def compare_with_dense(
    model: Model, dense_folder: Path, tokens_S: Tensor, *, groups: ProcessGroupCollection
) -> Agreement:
    """Run both models on ``tokens_S``; every rank returns the same numbers.

    Rank 0 temporarily loads the dense model with `transformers`, in the precision of the run (bf16
    for a run in fp8). Only its logits are sent to the other ranks.
    """
    parameter = next(model.modules[0].parameters())
    with without_fp8(model.transformer):
        own_sv = _moe_logits(model, tokens_S, groups)
    vocab_size = model.spec.vocab_size
    dense_SV = torch.empty(len(tokens_S), vocab_size, device=parameter.device)
    if dist.get_rank() == 0:
        dense_SV.copy_(_dense_logits(dense_folder, tokens_S, parameter.dtype, parameter.device))
    dist.broadcast(dense_SV, src=0)
    worst = torch.zeros(1, device=parameter.device)
    agreed = torch.zeros(2, device=parameter.device)
    if own_sv is not None:
        width = padded_vocabulary(vocab_size, groups.tp.size())
        columns = ShardIndex(groups.tp.rank(), groups.tp.size()).slice_of(width)
        expected_sV = _part_of(dense_SV, groups.cp)
        real = max(min(columns.stop, vocab_size) - columns.start, 0)
        expected_sv = expected_sV[:, columns.start : columns.start + real]
        if real:
            worst[0] = (own_sv[:, :real].float() - expected_sv).abs().max()
        same_s = _argmax(own_sv, columns.start, groups.tp) == expected_sV.argmax(dim=-1)
        agreed[0], agreed[1] = same_s.sum(), len(same_s)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(agreed)
    return Agreement(float(worst), float(agreed[0] / agreed[1]), len(tokens_S))


def _moe_logits(model: Model, tokens_S: Tensor, groups: ProcessGroupCollection) -> Tensor | None:
    """Return this rank's part of the logits, ``(s, v)``; None on ranks before the last stage."""
    process = make_output_processor(vocab_size=model.spec.vocab_size, tp_group=groups.tp)
    device = next(model.modules[0].parameters()).device
    positions_S = torch.arange(len(tokens_S))
    batch = [_part_of(x, groups.cp)[None].to(device) for x in (tokens_S, positions_S)]

    def forward_step(_: Any, module: Any) -> tuple[Tensor, Any]:
        return module(*batch, None, output_processor=process), _keep

    for module in model.modules:
        module.eval()
    many = len(model.modules) > 1
    schedule: Any = get_forward_backward_func()
    outputs = schedule(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model.modules) if many else None,
        model=model.modules if many else model.modules[0],
        num_microbatches=groups.pp.size() if many else 1,
        seq_length=len(tokens_S),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for module in model.modules:
        module.train()
    return outputs[0][0] if outputs else None


def _keep(logits_BSV: Tensor, *, non_loss_data: bool) -> Tensor:
    return logits_BSV


def _dense_logits(
    folder: Path, tokens_S: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    dense = load_model(folder, device=device, dtype=dtype)
    return dense(tokens_S[None].to(device)).logits[0].float()


def _part_of(x_S: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
    return zigzag(x_S, dim=0, cp_rank=cp_group.rank(), cp_size=cp_group.size())


def _argmax(logits_sv: Tensor, first: int, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the most likely token over all tp ranks, ``(s,)``; ties go to the lowest id."""
    value_s, index_s = logits_sv.float().max(dim=-1)
    best = torch.stack([value_s, (index_s + first).float()])
    gathered = [torch.empty_like(best) for _ in range(tp_group.size())]
    dist.all_gather(gathered, best, group=tp_group)
    values_Ps, ids_Ps = torch.stack(gathered).unbind(dim=1)
    return ids_Ps.gather(0, values_Ps.argmax(dim=0, keepdim=True))[0].long()
