"""Tests that mapped tensors equal those that torch loads, and that only used rows are read."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_moe.checkpoint.mapped import map_tensor

ROWS_R = torch.tensor([4, 0, 3])


def write(path: Path, tensor: Tensor, *, before: int) -> int:
    """Save ``tensor`` after ``before`` other bytes; return its length in bytes."""
    saved = io.BytesIO()
    torch.save(tensor, saved)
    path.write_bytes(b"x" * before + saved.getvalue() + b"y" * 7)
    return len(saved.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 37, 4096])
def test_rows_are_those_that_were_saved(tmp_path: Path, dtype: torch.dtype, before: int):
    tensor = torch.randn(6, 5).to(dtype)
    length = write(tmp_path / "file", tensor, before=before)
    mapped = map_tensor(tmp_path / "file", offset=before, length=length)
    assert torch.equal(mapped.rows(ROWS_R), tensor[ROWS_R])
    assert mapped.shape == (6, 5)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.randn(6), id="one-axis"),
        pytest.param(torch.randn(5, 6).t(), id="by-columns"),
        pytest.param(torch.randn(9, 5)[2:8], id="part-of-a-storage"),
    ],
)
def test_a_tensor_of_any_kind(tmp_path: Path, tensor: Tensor):
    length = write(tmp_path / "file", tensor, before=3)
    mapped = map_tensor(tmp_path / "file", offset=3, length=length)
    assert torch.equal(mapped.rows(ROWS_R), tensor[ROWS_R])


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6)], ids=["weights", "norms"])
def test_layers_in_one_tensor(tmp_path: Path, shape: tuple[int, ...]):
    tensor = torch.randn(shape)
    length = write(tmp_path / "file", tensor, before=1)
    mapped = map_tensor(tmp_path / "file", offset=1, length=length)
    for layer in range(3):
        assert torch.equal(mapped.at(layer).rows(ROWS_R), tensor[layer][ROWS_R])


def test_what_is_not_taken_is_not_read(tmp_path: Path):
    """A row that changes in the file after the mapping is read with its new values."""
    tensor = torch.randn(1000, 1000)
    path = tmp_path / "file"
    length = write(path, tensor, before=0)
    raw = bytearray(path.read_bytes())
    offset = raw.index(tensor[500].numpy().tobytes())
    mapped = map_tensor(path, offset=0, length=length)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(4000))
    assert not mapped.rows(torch.tensor([500])).any()
    assert torch.equal(mapped.rows(torch.tensor([499, 501])), tensor[[499, 501]])
