"""Tests of stage times: from the wall clock on CPU, from stream events on CUDA."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe.runtime.wait import StageClock, waiter


@pytest.fixture
def device_clock(monkeypatch: pytest.MonkeyPatch):
    """Fake a device whose stream is at ``now`` seconds, while the host's clock stands still."""
    clock = SimpleNamespace(now=0.0, waits=0)

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            clock.waits += 1

        def elapsed_time(self, later: "Event") -> float:
            return (later.at - self.at) * 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    return clock


def test_on_cuda_a_stage_takes_what_its_kernels_take(device_clock: SimpleNamespace):
    stages = StageClock(torch.device("cuda", 0))
    stages.start("data")
    for stage, seconds in [("forward", 1.0), ("backward", 2.0), ("forward", 3.0), ("report", 4.0)]:
        device_clock.now += seconds  # device time of the previous stage
        stages.enter(stage)
    assert device_clock.waits == 0, "entering a stage waited for the device"
    assert stages.seconds() == {"data": 1.0, "forward": 6.0, "backward": 3.0}
    assert device_clock.waits == 1


def test_on_cpu_a_stage_takes_what_the_wall_clock_says(monkeypatch: pytest.MonkeyPatch):
    readings = iter([1.0, 2.0, 5.0, 9.0, 20.0, 21.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    stages = StageClock(torch.device("cpu"))
    stages.start("data")
    for stage in ("forward", "data", "report"):
        stages.enter(stage)
    assert stages.seconds() == {"data": 5.0, "forward": 3.0}
    stages.start("report")
    stages.enter("data")
    assert stages.seconds() == {"report": 1.5}


def test_only_cuda_has_something_to_wait_for(monkeypatch: pytest.MonkeyPatch):
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("waited"))
    waiter(torch.device("cpu"))()
    assert waits == []
    waiter(torch.device("cuda", 1))()
    assert waits == ["waited"]
