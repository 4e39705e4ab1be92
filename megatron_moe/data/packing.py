"""Pack whole documents into sequences of one length, and find their bounds.

Shape letters: ``S`` seq_length, ``N`` documents in a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Assign documents to sequences: return the indices of each sequence's documents.

    Every document is assigned once and none is cut. The algorithm is best-fit-decreasing (arXiv
    2404.10830): longest first, each document goes to the sequence where it leaves the least room,
    and starts a new sequence only if it fits nowhere. Therefore no two sequences could be merged.
    The result depends on the lengths alone.

    Args:
        lengths: Tokens of each document, each between 1 and ``capacity``.
        capacity: Tokens of a sequence.

    >>> pack([4, 6, 3, 7], capacity=10)
    [[3, 2], [1, 0]]
    """
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by tokens left
    rooms = 0  # bit r is set if with_room[r] is not empty: finds the best fit in one step
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(index)
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return packs


def document_bounds(position_ids_S: Tensor) -> Tensor:
    """Return the starts of the documents in a packed sequence, and its end: ``(N + 1,)``, int32.

    This is ``cu_seqlens`` of Megatron-Core's ``PackedSeqParams``, which restricts attention to one
    document. A document begins at each position id of 0.
    """
    starts = (position_ids_S == 0).nonzero().squeeze(1)
    end = starts.new_tensor([len(position_ids_S)])
    return torch.cat((starts, end)).to(torch.int32)
