"""Some of the faults between hosts of ``make chaos``; the harness checks the losses."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Hosts, missing

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import chaos_job
from faults import network
from faults.fault import Fault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos_job.Stage]:
    with Hosts(chaos_job.RANKS) as hosts:
        yield chaos_job.Stage(tmp_path_factory.mktemp("hosts"), hosts)


def vanishes(hosts: Hosts) -> Fault:
    return network.cut_off(hosts, "forward")


def returns(hosts: Hosts) -> Fault:
    return network.cut_off(hosts, "forward", seconds=3)


def read_only(hosts: Hosts) -> Fault:
    return network.folder_fails_on_a_host()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            vanishes,
            r"JobError: rank ([01]) on host\1 has been silent for \d+ s; .*"
            r" or host\1 is unreachable\n  run the same command to resume",
        ),
        (returns, r"^$|Saved"),
        (read_only, r"rank 1: the file system is mounted read-only"),
    ],
)
def test_a_run_survives_its_network(
    stage: chaos_job.Stage, fault: Callable[[Hosts], Fault], message: str
):
    assert stage.hosts is not None
    outcome = chaos_job.inject(stage, fault(stage.hosts))
    assert re.search(message, outcome.message), outcome.message
