"""Tests of buffered copies, with a fake device that copies only when it is waited for."""

import pytest
import torch
from torch import Tensor

from megatron_moe.checkpoint.host import copied_to_host, copy_bytes, on_host

SIZE = 8


class LateBuffer:
    """A buffer that performs its copy when it is emptied, and counts copies in progress."""

    under_way = 0
    most = 0

    def __init__(self) -> None:
        self.size = SIZE
        self.pending: tuple[Tensor, Tensor] | None = None

    def fill(self, source: Tensor, target: Tensor) -> None:
        assert self.pending is None, "filled again before it was emptied"
        self.pending = source, target
        LateBuffer.under_way += 1
        LateBuffer.most = max(LateBuffer.most, LateBuffer.under_way)

    def empty(self) -> None:
        if self.pending is not None:
            source, target = self.pending
            target.copy_(source)
            self.pending = None
            LateBuffer.under_way -= 1


@pytest.mark.parametrize("length", [0, 1, SIZE, SIZE + 1, 5 * SIZE, 5 * SIZE + 3])
def test_every_byte_arrives_and_two_copies_are_under_way(length: int):
    LateBuffer.under_way = LateBuffer.most = 0
    source = torch.arange(length, dtype=torch.uint8)
    target = torch.full_like(source, 255)
    copy_bytes(source, target, [LateBuffer(), LateBuffer()])
    assert torch.equal(target, source)
    assert LateBuffer.under_way == 0
    assert LateBuffer.most == min(2, -(-length // SIZE))


def test_what_is_on_the_host_is_copied_only_where_a_copy_is_wanted():
    tensor = torch.arange(6.0).view(2, 3)
    assert on_host(tensor) is tensor
    copy = copied_to_host(tensor)
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
