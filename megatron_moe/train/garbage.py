"""Collect garbage at chosen steps, the same on every rank, and not in the middle of one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

INTERVAL = 50
"""Steps between collections. Python's own collector runs whenever a rank has made enough objects,
on another rank at another moment, and the others wait for it each time. A collection of what steps
leave takes milliseconds, and they leave no tensors (a test looks), so a rarer one would gain
nothing and a more frequent one would only cost."""


@contextlib.contextmanager
def collected_by_hand() -> Iterator[None]:
    """Switch Python's collector off for the length of a ``with`` block.

    What lives when the block begins (modules, the model) is left out of collections in it.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
