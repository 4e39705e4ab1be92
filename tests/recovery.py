"""What a test of a lost machine tells the table of ``make chaos``: see tools/faults/tested.py."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable

Record = Callable[[str, object], None]
"""pytest's fixture ``record_property``."""
TOLD = (
    r"(rank \d+: )?\w+Error: |(slurm\.sbatch|launch/\w+\.sh): |(Stopped|Resumed|Layout) |"
    r"srun: error: Node"
)
"""Beginnings of lines that tell an operator what happened."""


def told(output: str) -> str:
    """Return the lines of a log that tell what happened, with the ends of paths."""
    lines = [line for line in output.splitlines() if re.match(TOLD, line)]
    return "\n".join(re.sub(r"/\S+/(?=[^/\s]+/[^/\s]+)", "", line) for line in lines)


class Recovery:
    """Measure, from construction, when a job takes its first new step after a restart.

    Args:
        last_step: Returns the last step that the job has logged.
        log: Returns what all attempts of the job have printed.
    """

    def __init__(self, last_step: Callable[[], int], log: Callable[[], str]) -> None:
        self._last_step, self._log = last_step, log
        self._start, self._seconds = time.monotonic(), 0.0
        self._before, self._reached = self._resumed(), last_step()
        self._again = 0
        self._thread = threading.Thread(target=self._measure, daemon=True)
        self._thread.start()

    def _resumed(self) -> Counter[str]:
        """Return the steps from which the job has resumed."""
        return Counter(re.findall(r"^Resumed .* at step (\d+)", self._log(), re.MULTILINE))

    def _step(self) -> int:
        try:
            return self._last_step()
        except (OSError, ValueError):  # half a line
            return 0

    def _measure(self) -> None:
        while not (new := self._resumed() - self._before):
            self._reached = max(self._reached, self._step())
            time.sleep(0.2)
        self._again = self._reached - int(next(iter(new)))
        while self._step() <= self._reached:
            time.sleep(0.2)
        self._seconds = time.monotonic() - self._start

    def record(self, record_property: Record) -> None:
        """Put what happened into the test's report; call it after the end of the job."""
        self._thread.join(60)
        record_property("saw", told(self._log()))
        record_property("steps_again", self._again)
        record_property("recover_seconds", round(self._seconds, 1))
