"""Run torchrun's agent on this machine, as local.sh and nodes.sh ask, and say in words why it ends.

torchrun itself would end with a traceback of its own modules, below the errors of the ranks, and it
would restart ranks that have refused a setting or a file, which no restart changes.
"""

import contextlib
import logging
import socket
import sys
import time
from typing import Any

from keeper import NAME, limited_rendezvous
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.launcher import api as launcher

REFUSED = 2
"""Exit status of ranks whose error another try would repeat (megatron_moe/cli/main.py)."""
WAIT_SECONDS = 30
"""Longest wait for the other machines once ranks of this one have refused their input."""
LISTEN_SECONDS = 2
"""Seconds between questions whether another machine has refused its input."""
PATIENCE_SECONDS = 20
"""Seconds from a yes until the ranks of this machine are stopped. Most inputs are refused on all
machines, and each is to print its own reason; less than `WAIT_SECONDS`."""
KEY = "megatron-moe-refused"


class RefusedElsewhereError(Exception):
    """Ranks of another machine have refused their input, and those of this one wait for them."""


class Agent(LocalElasticAgent):
    """Agent of torchrun that restarts nothing if a rank of any machine has refused its input."""

    _listened = _ends = 0.0
    """Times of the last question, and at which ranks are stopped if another machine has refused."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if refused(result):
            self._remaining_restarts = 0
            with contextlib.suppress(RuntimeError):  # the keeper of the rendezvous is gone
                self._store.set(KEY, socket.gethostname())
        elif result.state == WorkerState.HEALTHY:
            self._listen()
        return result

    def _listen(self) -> None:
        """End the ranks of this machine a while after those of another have refused their input."""
        now = time.monotonic()
        if now - self._listened < LISTEN_SECONDS:
            return
        self._listened = now
        host = ""
        with contextlib.suppress(RuntimeError):  # the agent notices a lost connection by itself
            host = self._store.get(KEY).decode() if self._store.check([KEY]) else ""
        if not host:
            return
        self._ends = self._ends or now + PATIENCE_SECONDS
        if now >= self._ends:
            raise RefusedElsewhereError(host)

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        result = super()._invoke_run(role)
        if refused(result):
            # A setting is refused on all machines, on some later than here. If the keeper of the
            # rendezvous did not wait for them, they would report its end instead of their reason.
            self._exit_barrier_timeout = WAIT_SECONDS
            self._exit_barrier()
        return result


def refused(result: RunResult) -> bool:
    """Return whether a rank of this machine has refused its input."""
    return any(failure.exitcode == REFUSED for failure in result.failures.values())


def main() -> None:
    """Run the agent with the arguments of torchrun."""
    launcher.LocalElasticAgent = Agent
    rendezvous_handler_registry.register(NAME, limited_rendezvous)
    # It warns of each heartbeat and farewell that the rendezvous does not take, which is usual at
    # the end of a job; if it matters, an exception follows.
    quiet("elastic.rendezvous.dynamic_rendezvous", logging.ERROR)
    # It warns that each of several ranks computes with one thread, unless OMP_NUM_THREADS is set.
    quiet("run", logging.ERROR)
    # Both report the exit status of each rank in some lines; we do so in one.
    quiet("elastic.multiprocessing.api", logging.CRITICAL)
    quiet("elastic.agent.server.api", logging.CRITICAL)
    args = torchrun.parse_args(sys.argv[1:])
    script = "launch/local.sh" if args.standalone else "launch/nodes.sh"
    try:
        torchrun.run(args)
    except (ChildFailedError, SignalException, RefusedElsewhereError, *RENDEZVOUS) as error:
        reason, way_out = explained(error, args)
        if args.standalone:
            way_out = way_out.replace(" on all machines", "")
        print(f"{script}: {reason}.\n  {way_out}.", file=sys.stderr)
        sys.exit(1)


def quiet(module: str, level: int) -> None:
    """Log only messages of this level, or above, from a module of torchrun."""
    logging.getLogger(f"torch.distributed.{module}").setLevel(level)


RENDEZVOUS = (RendezvousConnectionError, RendezvousTimeoutError, RendezvousClosedError)
AGAIN = "run the same command on all machines"
RESUME = f"{AGAIN.capitalize()} to resume from the newest checkpoint"


def explained(error: Exception, args: Any) -> tuple[str, str]:
    """Return why this machine's part of the job ends, and what to do."""
    match error:
        case ChildFailedError():
            codes = {failure.exitcode for failure in error.failures.values()}
            return (
                f"ranks of this machine failed with exit status {', '.join(map(str, codes))}: "
                "their errors are above",
                f"Correct what they name, and {AGAIN}" if REFUSED in codes else RESUME,
            )
        case RefusedElsewhereError():
            return (
                f"ranks of {error}, another machine of the job, have refused a setting or a file: "
                "the reason is in its output",
                f"Correct what it names, and {AGAIN}",
            )
        case RendezvousConnectionError():
            return (
                f"the rendezvous at {args.rdzv_endpoint} does not answer: the machine that keeps "
                "it is gone, or cannot be reached from here, or another program uses its port",
                f"{RESUME}; if that machine is gone, with another MASTER_ADDR; if the port is "
                "taken, with another MASTER_PORT",
            )
        case RendezvousTimeoutError():
            fewest = args.nnodes.partition(":")[0]
            return f"fewer than {fewest} machines have joined in time", RESUME
        case RendezvousClosedError():
            return (
                f"the job {args.rdzv_id} has ended on the other machines, and takes no new ones",
                f"Once they have ended, {AGAIN}",
            )
        case SignalException():
            return f"stopped by {error.sigval.name}", RESUME
    raise error


if __name__ == "__main__":
    main()
