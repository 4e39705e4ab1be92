"""Run Python's garbage collector at fixed steps, at the same time on every rank."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

INTERVAL = 50
"""Steps between collections. Python's automatic collector runs whenever a rank has allocated enough
objects, so at a different time on each rank, and the other ranks wait each time. Collecting the
garbage of these steps takes milliseconds, and it holds no tensors (a test checks this), so a longer
interval would gain nothing and a shorter one would only cost time."""


@contextlib.contextmanager
def manual_collection() -> Iterator[None]:
    """Disable Python's automatic garbage collector inside a ``with`` block.

    Objects that exist when the block begins (modules, the model) are frozen: collections inside the
    block skip them.
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


def collect_everything() -> None:
    """Collect also what existed before `manual_collection` began, such as an old model."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
