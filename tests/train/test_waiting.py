"""Tests of waiting ranks: threads blocked in C, like in a call that reads a CUDA tensor."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace

import pytest
import torch

from megatron_moe.runtime.world import World
from megatron_moe.train.waiting import waits_for_ranks
from megatron_moe.train.watch import Watch, unobserved

LOCK = threading.Lock()
TENSOR = SimpleNamespace(
    item=LOCK.acquire, tolist=LOCK.acquire, cpu=LOCK.acquire, synchronize=LOCK.acquire,
    read=LOCK.acquire,
)  # fmt: skip


def reads_an_item() -> None:
    float(
        TENSOR.item(),
    )


def reads_a_list() -> None:
    [TENSOR.tolist()]


def copies() -> None:
    TENSOR.cpu()


def synchronizes() -> None:
    TENSOR.synchronize()


def reads_a_file() -> None:
    TENSOR.read()


def sleeps() -> None:
    while LOCK.locked():
        time.sleep(0.01)


@contextmanager
def blocked(function: Callable[[], None]) -> Iterator[tuple[int, FrameType]]:
    """Block a thread inside ``function``; yield its id and its innermost frame."""
    with LOCK:
        thread = threading.Thread(target=function)
        thread.start()
        assert thread.ident is not None
        while sys._current_frames()[thread.ident].f_code is not function.__code__:
            time.sleep(0.01)
        time.sleep(0.05)  # from its first line into the lock
        yield thread.ident, sys._current_frames()[thread.ident]
    thread.join()
    if LOCK.locked():
        LOCK.release()


@pytest.mark.parametrize(
    ("function", "waits"),
    [
        (reads_an_item, True), (reads_a_list, True), (copies, True), (synchronizes, True),
        (reads_a_file, False), (sleeps, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_on_cuda_a_rank_waits_where_it_reads_from_the_device(
    function: Callable[[], None], waits: bool
):
    with blocked(function) as (_, frame):
        assert waits_for_ranks(frame, cuda=True) == waits
        assert not waits_for_ranks(frame, cuda=False)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_watch_reports_it(kind: str):
    world = World(0, 1, 0, torch.device(kind), "127.0.0.1")
    watch = Watch.__new__(Watch)  # skips the stage clock, because the device does not exist
    watch._world = world
    cpu = World(0, 1, 0, torch.device("cpu"), "127.0.0.1")
    watch._report = Watch(cpu, hang_seconds=1, observe=unobserved)._report
    with blocked(reads_an_item) as (thread, _):
        watch._training_thread = thread
        report = watch._located()
    assert report.waiting == (kind == "cuda")
    assert "reads_an_item" in report.where or "threading" in report.where
