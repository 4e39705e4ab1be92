"""Tests of what a job opens to the network: where it listens, and who can connect."""

import os
import re
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_moe.errors import JobError
from megatron_moe.runtime.world import World
from megatron_moe.train import port
from megatron_moe.train import watch as watch_module
from megatron_moe.train.port import connect, hosts_of, listening_on
from megatron_moe.train.watch import Watch, unobserved


def listening() -> set[tuple[str, int]]:
    """Return all TCP ports on which this process listens."""
    connections = psutil.Process().net_connections(kind="tcp")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.distributed
def test_local_ranks_listen_on_loopback_alone():
    run_on_ranks(_listens_on_loopback, world_size=2)


def _listens_on_loopback(world: World) -> None:
    before = listening()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    with Watch(world, hang_seconds=60, observe=unobserved):
        opened = listening() - before
        assert len(opened) == (1 if world.rank == 0 else 0), "rank 0 opens one port, others none"
        hosts = {host for host, _ in listening()}
        assert hosts <= {"127.0.0.1"}, hosts
        dist.barrier()


@pytest.mark.distributed
def test_a_job_continues_after_a_stranger_has_spoken_to_it():
    run_on_ranks(_is_spoken_to, world_size=2)


def _is_spoken_to(world: World) -> None:
    before = listening()
    with Watch(world, hang_seconds=6, observe=unobserved) as watch:
        for address in listening() - before:
            with socket.create_connection(address) as stranger:
                stranger.sendall(
                    b"GET / HTTP/1.1\r\nHost: rank0\r\nAccept: */*\r\n\r\n" + bytes(100)
                )
        for step in range(14):  # longer than hang_seconds
            watch.step = step
            watch.at("forward")
            time.sleep(0.5)
        dist.barrier()


@pytest.mark.distributed
def test_addresses_other_hosts_can_reach_are_preferred(monkeypatch: pytest.MonkeyPatch):
    run_on_ranks(_knows_addresses, world_size=2)


def _knows_addresses(world: World) -> None:
    def known(name: str, _: None, **__: object) -> list[tuple]:
        if name == "own":  # as Debian's hosts file has a host's own name
            host = "127.0.1.1" if world.rank == 0 else "192.0.2.7"
        elif name == "unknown":
            raise socket.gaierror
        else:
            host = "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))]

    socket.getaddrinfo = known
    assert hosts_of("own") == ["192.0.2.7"]
    assert hosts_of("localhost") == ["127.0.0.1"]
    assert hosts_of("unknown") == []


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [(["192.0.2.7"], "192.0.2.7 is not an address of it"), ([], "no rank can resolve it")],
)
def test_a_master_address_of_another_host_is_refused(hosts: list[str], reason: str):
    servers, problem = listening_on("node7", hosts)
    assert servers == []
    assert problem is not None
    assert re.match(r"MASTER_ADDR \(node7\) must be an address of rank 0's host", problem)
    assert reason in problem
    assert "\n  set MASTER_ADDR to" in problem


def test_it_listens_at_each_address_of_rank_0():
    hosts = ["127.0.0.1", "192.0.2.7", "::1"] if socket.has_ipv6 else ["127.0.0.1", "192.0.2.7"]
    servers, problem = listening_on("node0", hosts)
    assert problem is None
    assert {server.getsockname()[0] for server in servers} <= set(hosts) - {"192.0.2.7"}
    assert servers
    for server in servers:
        server.close()


def test_a_rank_that_cannot_connect_says_to_whom(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(port, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(JobError, match=r"rank 3 on .* cannot report to rank 0: 127\.0\.0\.1 port"):
        connect([address], bytes(32), rank=3)


@pytest.mark.distributed
def test_a_rank_ends_even_if_it_cannot_say_why(monkeypatch: pytest.MonkeyPatch):
    """As when standard error is a file on a full disk: it would wait for the lost rank forever."""
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.2)
    with pytest.raises(JobError) as caught:
        run_on_ranks(_cannot_report, world_size=2)
    assert "rank 1 exited with code 3" in str(caught.value)
    assert "rank 0 failed and left no report" in str(caught.value), "it was killed instead"


def _cannot_report(world: World) -> None:
    launched = replace(world, reports=None)  # as by torchrun: errors go to standard error
    with Watch(launched, hang_seconds=60, observe=unobserved):
        sys.stderr = Path("/dev/full").open("w")  # noqa: SIM115
        dist.barrier()
        if world.rank == 1:
            os._exit(3)
        time.sleep(1200)
