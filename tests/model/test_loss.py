"""Tests of token losses and gradients against torch's cross entropy without padding.

Shape letters: S sequence, B batch, D hidden_size, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from ranks import run_on_ranks
from torch import Tensor

from megatron_moe.model.loss import make_output_processor
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
S, B, D = 6, 2, 4

CASES = [
    pytest.param(8, 1, id="V8-tp1"),
    pytest.param(8, 2, id="V8-tp2"),
    pytest.param(7, 2, id="V7-tp2-one-row-of-padding"),
    pytest.param(5, 4, id="V5-tp4-a-rank-of-padding-only"),
]


@pytest.mark.parametrize(("vocab_size", "tp"), CASES)
def test_losses_and_gradients_are_torchs(vocab_size: int, tp: int):
    run_on_ranks(check_loss, vocab_size, world_size=tp)


def check_loss(world: World, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    width = padded_vocabulary(vocab_size, world.size) // world.size
    first = world.rank * width
    real = max(min(vocab_size - first, width), 0)
    hidden_SBD = torch.randn(S, B, D, generator=generator)
    # Padding rows are the largest, so counting them would show.
    weight_VD = torch.randn(width * world.size, D, generator=generator) * 3
    weight_VD[vocab_size:] = 100.0
    labels_BS = torch.randint(0, vocab_size, (B, S), generator=generator)
    upstream_BS = torch.rand(B, S, generator=generator)

    full_hidden, full_weight = (
        x.clone().requires_grad_() for x in (hidden_SBD, weight_VD[:vocab_size])
    )
    logits_BSV = (full_hidden @ full_weight.T).transpose(0, 1)
    expected_BS = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
    expected_BS = expected_BS.view(B, S)
    expected_BS.backward(upstream_BS)

    hidden = hidden_SBD.clone().requires_grad_()
    weight = weight_VD[first : first + width].clone().requires_grad_()
    process = make_output_processor(vocab_size=vocab_size, tp_group=dist.group.WORLD)

    def run(labels: Tensor | None) -> Tensor:
        return process(
            hidden_states=hidden,
            output_layer=lambda h, weight: (h @ weight.T, None),
            output_weight=weight,
            labels=labels,
            position_ids=None,
        )

    losses_BS = run(labels_BS)
    losses_BS.backward(upstream_BS)
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert losses_BS.dtype == torch.float32
    torch.testing.assert_close(losses_BS, expected_BS, **close)
    torch.testing.assert_close(weight.grad[:real], full_weight.grad[first : first + real], **close)
    assert not weight.grad[real:].any(), "rows that pad learn nothing"
    dist.all_reduce(hidden.grad)  # as in the backward pass of the column-parallel output layer
    torch.testing.assert_close(hidden.grad, full_hidden.grad, **close)

    mine_BSV = run(None)
    assert mine_BSV.shape == (B, S, width)
    torch.testing.assert_close(mine_BSV[..., :real], logits_BSV[..., first : first + real], **close)
    assert (mine_BSV[..., real:] == float("-inf")).all(), "padding is never the next token"


def test_losses_are_summed_in_fp32_when_logits_are_bf16():
    run_on_ranks(check_bf16, world_size=1)


def check_bf16(world: World) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_SBV = torch.randn(S, B, 500, generator=generator).bfloat16()
    labels_BS = torch.randint(0, 500, (B, S), generator=generator)
    losses_BS = make_output_processor(vocab_size=500, tp_group=dist.group.WORLD)(
        hidden_states=logits_SBV,
        output_layer=lambda h, weight: (h, None),
        output_weight=None,
        labels=labels_BS,
    )
    expected = F.cross_entropy(
        logits_SBV.double().permute(1, 2, 0), labels_BS, reduction="none"
    ).float()
    assert losses_BS.dtype == torch.float32
    torch.testing.assert_close(losses_BS, expected, rtol=1e-6, atol=1e-6)
