"""Compile elementwise functions, on CUDA only.

Eager torch reads and writes whole tensors in every operation; a compiled function does so once. The
compiler is imported at the first call with a CUDA tensor, because importing it takes seconds that
CPU runs do not need to spend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled_on_cuda[F: Callable[..., Any]](function: F) -> F:
    """Return ``function``, compiled by ``torch.compile`` if its first argument is a CUDA tensor.

    A dimension that changes between calls, such as the number of tokens, becomes symbolic after its
    first change, so a function is compiled twice and not once per size. Empty tensors use eager
    torch: the compiler would build a kernel for that size alone.
    """
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(first: torch.Tensor, *others: Any) -> Any:
        if not first.is_cuda or not first.numel():
            return function(first, *others)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](first, *others)

    return call  # type: ignore[return-value]
