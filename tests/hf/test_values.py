"""Checking and selecting values as integers gives the same results as torch on floats."""

from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.dtypes import OF_SAFETENSORS
from megatron_moe.hf.header import TensorInfo
from megatron_moe.hf.values import check_finite, take

FLOATS = list(OF_SAFETENSORS.values())
ROWS = [slice(0, 8), slice(2, 7), torch.tensor([5, 0, 5, 7])]
COLUMNS = [None, slice(0, 6), slice(1, 4), torch.tensor([4, 0, 4])]


def check(values: torch.Tensor) -> None:
    info = TensorInfo(tuple(values.shape), values.dtype, Path("model.safetensors"), 0)
    check_finite("w", info, values, "rows 0 to 1")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_finite_number_passes_and_no_other(dtype: torch.dtype):
    """Check both signs, also of NaN, which has a sign bit like any other value."""
    limits = torch.finfo(dtype)
    check(torch.tensor([[limits.max, limits.min, 0.0], [-0.0, limits.tiny, -1.0]], dtype=dtype))
    check(torch.empty(0, 3, dtype=dtype))
    for number in ("nan", "inf"):
        for sign in (1.0, -1.0):
            wrong = torch.tensor(float(number)).copysign(torch.tensor(sign)).to(dtype)
            values = torch.zeros(2, 6, dtype=dtype)
            values[1, 2] = wrong
            with pytest.raises(CheckpointError, match=r"has 1 NaN or infinite .* rows 0 to 1"):
                check(values[:, 1:4])
            check(values[:, 3:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), list(product(ROWS, COLUMNS)))
def test_take_is_what_indexing_gives(dtype, rows, columns):
    values = torch.arange(48).reshape(8, 6).to(dtype)
    expected = values[rows] if columns is None else values[rows][:, columns]
    assert torch.equal(take(values, rows, columns, None), expected)
    around = torch.zeros(len(expected), 10, dtype=dtype)
    out = around[:, 3 : 3 + expected.shape[1]]  # a part of a parameter's rows
    assert take(values, rows, columns, out) is out
    assert torch.equal(around[:, 3 : 3 + expected.shape[1]], expected)
    assert around.count_nonzero() == expected.count_nonzero()
