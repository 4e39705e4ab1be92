"""launch/slurm.sbatch on a real SLURM: every job ends with the losses of an undisturbed run.

Two nodes of two ranks each. `make test-slurm` runs these tests; they need root and the packages
munge, slurmctld, slurmd and slurm-client of Debian or Ubuntu.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from recovery import Record
from slurm_cluster import NODES, Cluster, cluster, missing_programs, wait_for
from slurm_runs import SLOW, STEPS, Runs, assert_undisturbed, last_step, reached

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()) or os.geteuid() != 0,
        reason=f"needs root and {', '.join(missing_programs()) or 'nothing else'}",
    ),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    # Short, because a Unix socket lies in it.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        cluster(Path(folder)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_a_job_on_two_nodes_equals_local_ranks(slurm: Cluster, runs: Runs):
    number, run_dir = runs.submit(slurm, "two-nodes")
    output = assert_undisturbed(runs, slurm, number, run_dir)
    assert "slurm.sbatch: 4 ranks on 2 nodes" in output
    assert slurm.job(number)["NodeList"] == "n[1-2]"


def test_out_of_time_saves_requeues_and_resumes(
    slurm: Cluster, runs: Runs, record_property: Record
):
    # SLURM checks time limits twice a minute, so the signal comes 60 to 90 s after the start.
    options = ("--time=2", "--signal=B:USR1@60")
    number, run_dir = runs.submit(slurm, "out-of-time", *options, step_seconds="6")
    recovery = runs.recovery("out-of-time")
    output = assert_undisturbed(runs, slurm, number, run_dir)
    recovery.record(record_property)
    assert "slurm.sbatch: time is nearly up, saving" in output
    assert "Stopped by a signal after step" in output
    assert int(slurm.job(number)["Restarts"]) >= 1


def test_a_preempted_job_saves_and_resumes(slurm: Cluster, runs: Runs, record_property: Record):
    number, run_dir = runs.submit(slurm, "preempted", step_seconds=SLOW)
    reached(run_dir, 2)
    recovery = runs.recovery("preempted")
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        f"--output={runs.folder}/urgent.out", "--wrap=sleep 1",
    ).strip()  # fmt: skip
    slurm.wait_for_state(urgent, "COMPLETED")
    output = assert_undisturbed(runs, slurm, number, run_dir)
    recovery.record(record_property)
    assert "Stopped by a signal after step" in output
    assert int(slurm.job(number)["Restarts"]) == 1


def test_a_lost_node_requeues_the_job(slurm: Cluster, runs: Runs, record_property: Record):
    number, run_dir = runs.submit(slurm, "lost-node", step_seconds=SLOW)
    reached(run_dir, 6)
    recovery = runs.recovery("lost-node")
    slurm.kill_node(NODES[1])
    wait_for(lambda: int(slurm.job(number)["Restarts"]) == 1, "restart", seconds=120)
    slurm.start_node(NODES[1])
    output = assert_undisturbed(runs, slurm, number, run_dir)
    recovery.record(record_property)
    assert re.search(r"JobError: rank [23] on \S+ died in ", output)


def test_a_cancelled_job_ends_and_its_successor_resumes(
    slurm: Cluster, runs: Runs, record_property: Record
):
    number, run_dir = runs.submit(slurm, "cancelled", step_seconds=SLOW)
    reached(run_dir, 6)
    recovery = runs.recovery("cancelled")
    slurm.run("scancel", number)
    slurm.wait_for_state(number, "CANCELLED", seconds=60)
    wait_for(slurm.idle, "idle nodes")
    assert last_step(run_dir) < STEPS
    number, _ = runs.submit(slurm, "cancelled")
    assert_undisturbed(runs, slurm, number, run_dir)
    recovery.record(record_property)
