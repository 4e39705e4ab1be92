"""Tests of how ranks meet: one that does not start is named in time."""

import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_moe.errors import JobError
from megatron_moe.runtime import meeting
from megatron_moe.runtime.launchers import RankPosition


def position(rank: int, method: str, size: int = 3) -> RankPosition:
    return RankPosition(rank, size, rank, size, method)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEET_SECONDS", 2.0)


@pytest.fixture(params=["file", "tcp"])
def method(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file:{tmp_path / 'a b%20c'}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def meet_all(ranks: list[int], method: str) -> list[str]:
    """Let these ranks meet, as threads; return their errors."""
    errors = []

    def one(rank: int) -> None:
        try:
            stores.append(meeting.meet(position(rank, method)))
        except JobError as error:
            errors.append(f"{rank}: {error}")

    stores: list[object] = []  # kept: rank 0 serves the others until all are done
    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(errors)


def test_all_ranks_meet(method: str):
    assert meet_all([0, 1, 2], method) == []


def test_a_rank_that_does_not_start_is_named(method: str):
    start = time.monotonic()
    errors = meet_all([0, 2], method)
    assert time.monotonic() - start < 300
    assert len(errors) == 2
    assert errors[0].startswith("0: "), errors
    assert "rank 1 has not started within 2 s of rank 0, or cannot reach rank 0" in errors[0]


def test_rank_0_gives_up_first(monkeypatch: pytest.MonkeyPatch):
    """Its store ends with it, so rank 2 cannot ask who is missing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        method = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(meeting, "MEET_SECONDS", 20.0)
    rank_0 = meeting._store(position(0, method), timedelta(seconds=20))
    timer = threading.Timer(1.0, lambda: kept.clear())
    kept = [rank_0]
    del rank_0
    timer.start()
    with pytest.raises(JobError, match=r"rank 0 ended before rank 2 saw all 3 ranks start"):
        meeting.meet(position(2, method))


def test_rank_0_does_not_start():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(JobError, match=r"rank 1 cannot connect to rank 0 at 127\.0\.0\.1 within 2"):
        meeting.meet(position(1, f"tcp://127.0.0.1:{port}"))


def test_few_of_many_missing_ranks_are_named():
    assert meeting._listed([7]) == "rank 7 has"
    assert meeting._listed([*range(9)]) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1 more have"
