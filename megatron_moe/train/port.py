"""Open the watch's port at the addresses that ranks use, and connect to it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Sequence

import torch.distributed as dist

from megatron_moe.errors import JobError
from megatron_moe.train.handshake import introduce

CONNECT_SECONDS = 60.0
"""Seconds that a rank has to connect to rank 0 and to prove that it belongs to the job."""
ADDRESS_SECONDS = 10.0
"""Seconds that an address has to accept the connection, before the next one is tried."""
RETRY_SECONDS = 0.2
BACKLOG = 4096

Addresses = Sequence[tuple[str, int]]
"""Numeric host and port of each listening socket."""


def hosts_of(name: str) -> list[str]:
    """Return the numeric addresses that ``name`` (MASTER_ADDR) has on any rank; all ranks call it.

    A host often knows its own name as a loopback address, which others cannot reach. Loopback
    addresses are therefore left out if there are any others.
    """
    try:
        known = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror:  # another rank may know the name
        known = []
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, [str(entry[4][0]) for entry in known])
    hosts = list(dict.fromkeys(host for hosts in gathered for host in hosts))
    outside = [host for host in hosts if not ipaddress.ip_address(host.split("%")[0]).is_loopback]
    return outside or hosts


def listening_on(name: str, hosts: Sequence[str]) -> tuple[list[socket.socket], str | None]:
    """Listen at those of these addresses that this host has; return the sockets, or the problem.

    Args:
        name: Name that the addresses were found under, for the message.
        hosts: Numeric addresses.
    """
    servers: list[socket.socket] = []
    problems: list[str] = []
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            servers.append(socket.create_server((host, 0), family=family, backlog=BACKLOG))
        except OSError as error:  # such as the address of another host
            reason = "is not an address of it" if error.errno == errno.EADDRNOTAVAIL else str(error)
            problems.append(f"{host} {reason}")
    if servers:
        return servers, None
    return [], (
        f"MASTER_ADDR ({name}) must be an address of rank 0's host ({socket.gethostname()}), where "
        f"ranks report to: {'; '.join(problems) or 'no rank can resolve it'}.\n"
        "  set MASTER_ADDR to the name or address of the host that runs rank 0"
    )


def connect(addresses: Addresses, secret: bytes, *, rank: int) -> socket.socket:
    """Connect this rank to the watch of rank 0; try again while strangers crowd it out.

    Raises:
        JobError: Rank 0 could not be reached within `CONNECT_SECONDS`.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        problems = []
        for address in addresses:
            try:
                return _introduced(address, secret, rank=rank, deadline=deadline)
            except OSError as error:
                problems.append(f"{address[0]} port {address[1]}: {error}")
        if time.monotonic() > deadline - RETRY_SECONDS:
            raise JobError(
                f"rank {rank} on {socket.gethostname()} cannot report to rank 0: "
                f"{'; '.join(problems)}.\n"
                "  allow TCP connections between the hosts of a job on all ports"
            )
        time.sleep(RETRY_SECONDS)


def _introduced(
    address: tuple[str, int], secret: bytes, *, rank: int, deadline: float
) -> socket.socket:
    with contextlib.ExitStack() as on_error:
        connection = socket.create_connection(address, timeout=ADDRESS_SECONDS)
        on_error.enter_context(connection)
        introduce(connection, secret, rank=rank, deadline=deadline)
        on_error.pop_all()
        return connection
