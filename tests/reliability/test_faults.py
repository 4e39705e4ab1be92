"""A few of the faults of ``make chaos`` on every ``make test``; the harness checks the losses."""

import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import chaos_job
from faults import checkpoints, processes
from faults.fault import Fault

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> chaos_job.Stage:
    return chaos_job.Stage(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize(
    ("fault", "message", "steps_again"),
    [
        (
            processes.kill(1, "backward"),
            r"^JobError: rank 1 died in the backward stage of step 5: ",
            1,
        ),
        (processes.kill(0, "load", 0), r"^JobError: rank 0 died in the load stage: killed", 0),
        (processes.kill_half_written(1, async_save=True), r"^JobError: rank 1 died in ", None),
        (
            processes.hanging(1),
            r"no rank has made progress for 20 s: rank 1 is stuck in the data stage of step 5 at ",
            1,
        ),
        (
            processes.signaled(signal.SIGTERM),
            r"^Stopped by a signal after step \d+\. Run the same command",
            0,
        ),
        (
            checkpoints.truncated_shard(),
            r"(?s)^CheckpointError: cannot load .*\n  write step_",
            None,
        ),
        (
            checkpoints.index_that_names_code(),
            r"(?s)^CheckpointError: cannot read .* is not allowed in an index\n  write step_",
            None,
        ),
    ],
    ids=lambda value: value.name.replace(" ", "-") if isinstance(value, Fault) else "",
)
def test_a_run_survives(
    stage: chaos_job.Stage, fault: Fault, message: str, steps_again: int | None
):
    outcome = chaos_job.inject(stage, fault)
    assert re.search(message, outcome.message), outcome.message
    assert steps_again is None or outcome.steps_again == steps_again
    assert outcome.ended_seconds < 300


def test_the_second_job_on_a_folder_gets_an_error_that_names_the_first(stage: chaos_job.Stage):
    fault = processes.second_job(lambda run_dir: stage.job(run_dir, log_name="second").message)
    outcome = chaos_job.inject(stage, fault)
    assert "is in use by a running job, process " in outcome.message
    assert "\n  stop that job, wait for it to end, or set another run.dir" in outcome.message


def test_a_traceback_in_the_output_fails_a_row():
    output = "Exception in thread Thread-2 (_write):\nTraceback (most recent call last):\n"
    with pytest.raises(AssertionError, match="contains a traceback"):
        chaos_job.check_output(processes.kill_job(), output)
    chaos_job.check_output(processes.kill_job(), "JobError: rank 1 died in the load stage: killed")
