"""launch/slurm.sbatch on a real SLURM whose nodes are hosts: their network is cut.

The two nodes and the controller have an address and a network of their own each (tests/hosts.py),
so ranks, srun and SLURM's daemons reach each other over it alone.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, missing
from recovery import Record
from slurm_cluster import NODES, Cluster, cluster, missing_programs, wait_for
from slurm_runs import SLOW, Runs, assert_undisturbed, reached

MISSING = missing() or (f"needs {', '.join(missing_programs())}" if missing_programs() else None)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    # Short, because a Unix socket lies in it.
    with (
        Hosts(len(NODES) + 1) as hosts,
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        cluster(Path(folder), hosts) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_a_cut_link_requeues_the_job(slurm: Cluster, runs: Runs, record_property: Record):
    """SLURM's controller does not hear the node either; ranks of both sides have been ended."""
    number, run_dir = runs.submit(slurm, "cut-link", step_seconds=SLOW)
    reached(run_dir, 6)
    assert slurm.hosts is not None
    recovery = runs.recovery("cut-link")
    slurm.hosts.cut(1)
    requeued(slurm, number)
    slurm.hosts.heal()
    output = assert_undisturbed(runs, slurm, number, run_dir)
    recovery.record(record_property)
    assert "srun: error: Node failure on n2" in output
    assert "Traceback" not in output


def test_a_vanished_host_requeues_the_job(slurm: Cluster, runs: Runs, record_property: Record):
    number, run_dir = runs.submit(slurm, "vanished", step_seconds=SLOW)
    reached(run_dir, 6)
    assert slurm.hosts is not None
    recovery = runs.recovery("vanished")
    slurm.hosts.cut(1)  # first, so that no packet says that its processes end
    slurm.kill_node(NODES[1])
    requeued(slurm, number)
    slurm.hosts.heal()
    slurm.start_node(NODES[1])
    output = assert_undisturbed(runs, slurm, number, run_dir)
    recovery.record(record_property)
    assert "srun: error: Node failure on n2" in output
    assert "Traceback" not in output


def requeued(slurm: Cluster, number: str) -> None:
    """Wait until SLURM has noticed that the node is lost, and has requeued the job."""
    wait_for(lambda: int(slurm.job(number)["Restarts"]) == 1, "restart", seconds=120)
