"""torch's rendezvous ``c10d`` with a limit for lost machines, and with one clock for all of them.

One machine keeps the rendezvous, a store, and the agents of the others connect to it.
"""

import contextlib
import os
import socket
import threading
import time
from datetime import datetime, timedelta, tzinfo
from queue import Empty, SimpleQueue
from typing import Any

from torch.distributed import Store
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as dynamic
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    DEFAULT_PORT,
    C10dRendezvousBackend,
    create_backend,
)
from torch.distributed.elastic.rendezvous.utils import (
    _matches_machine_hostname,
    parse_rendezvous_endpoint,
)

NAME = "c10d_limited"
SILENT_SECONDS = 60
"""Seconds after which a connection to the keeper is lost if its machine does not answer."""
CONNECT_SECONDS = 90
"""Longest wait for the rendezvous; torch gives up a machine that is not there after 60 s."""
CLOCK, CLOCK_SECONDS, COMPARE_SECONDS = "megatron-moe-clock", 1, 60


class LimitedBackend(C10dRendezvousBackend):
    """torch's ``c10d`` under a name of its own, which torch asks of another constructor."""

    @property
    def name(self) -> str:
        """Name for ``--rdzv-backend``."""
        return NAME


class Clock:
    """Stand in for ``datetime`` in torch's rendezvous: the time of the keeper.

    torch compares the heartbeats of machines by the clock of each, and drops those older than 15 s.
    """

    ahead = timedelta(0)
    """How far the keeper's clock is ahead of this machine's."""

    @classmethod
    def now(cls, zone: tzinfo | None = None) -> datetime:
        """Return the keeper's time."""
        return datetime.fromtimestamp(time.time(), zone) + cls.ahead


def limited_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    """Return torch's rendezvous with both changes, for its registry."""
    store = _connected(params)
    host, port = parse_rendezvous_endpoint(params.endpoint, DEFAULT_PORT)
    # As create_backend decides who serves the store.
    _share_the_clock(store.clone(), keeps=_matches_machine_hostname(host))
    _limit_connections(port)
    return dynamic.create_handler(store, LimitedBackend(store, params.run_id), params)


def _connected(params: RendezvousParameters) -> Store:
    """Connect to the rendezvous, or serve it.

    torch itself would wait forever for an answer of another program at the same port.

    Raises:
        RendezvousConnectionError: It cannot be reached, or does not answer.
    """
    outcome: SimpleQueue[Store | Exception] = SimpleQueue()

    def connect() -> None:
        try:
            outcome.put(create_backend(params)[1])
        except Exception as error:  # raised below
            outcome.put(error)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        store = outcome.get(timeout=CONNECT_SECONDS)
    except Empty:
        raise RendezvousConnectionError(f"no answer within {CONNECT_SECONDS} s") from None
    if isinstance(store, Exception):
        raise store
    return store


def _share_the_clock(store: Store, *, keeps: bool) -> None:
    """Publish the time of this machine, or compare it with the keeper's, now and from now on."""

    def publish() -> None:
        store.set(CLOCK, repr(time.time()))

    def compare() -> None:
        Clock.ahead = timedelta(seconds=float(store.get(CLOCK)) - time.time())

    def repeat() -> None:
        with contextlib.suppress(RuntimeError):  # the connection is lost, which the agent notices
            while True:
                time.sleep(CLOCK_SECONDS if keeps else COMPARE_SECONDS)
                (publish if keeps else compare)()

    (publish if keeps else compare)()
    replaced: Any = dynamic
    replaced.datetime = Clock
    threading.Thread(target=repeat, name="clock", daemon=True).start()


def _limit_connections(port: int) -> None:
    """End this process's connections to the rendezvous if the other machine does not answer.

    torch's ``read_timeout`` does not apply to a request that the other machine does not even
    acknowledge. The system would repeat it for a quarter of an hour, and so long the agent waits.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.getpeername()[1] == port:
                        _limit(connection)


def _limit(connection: socket.socket) -> None:
    # For requests that are not acknowledged, and, with probes, while waiting for an answer.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS // 6)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_SECONDS // 6)
