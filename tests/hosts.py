"""Hosts on one machine: network namespaces, and a process that is the network between them.

Each host has a TUN device; the process reads the packets of all of them and delivers each after the
delay, unless it is lost or one of its hosts is cut off. This needs root, but neither bridges nor
netem in the kernel.
"""

import ctypes
import fcntl
import heapq
import itertools
import multiprocessing as mp
import os
import random
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_SWITCH_TICK_SECONDS = 0.05
LAUNCHER_SECONDS = 40.0
"""Seconds that the ranks on other hosts have to end after one has failed."""


def missing() -> str | None:
    """Return why there can be no hosts here, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        return "needs root, ip and /dev/net/tun"
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    return "needs network namespaces" if done.returncode else None


class Hosts:
    """Hosts that reach each other and nothing else, inside a ``with`` block.

    Args:
        count: Number of hosts.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"mm{os.getpid()}n{count}h{i}" for i in range(count)]
        self.addresses = [f"10.77.3.{i + 1}" for i in range(count)]
        context = mp.get_context("fork")
        self._cut = context.Array("i", count, lock=False)
        self._delay = context.Array("d", [0.0, 0.0], lock=False)
        self._ready = context.Event()
        self._process = context.Process(target=self._switch, daemon=True)

    def cut(self, host: int, *, off: bool = True) -> None:
        """Cut a host off, or connect it again; works from any forked process."""
        self._cut[host] = int(off)

    def slow_down(self, seconds: float, loss: float) -> None:
        """Delay each packet, and lose a share of them."""
        self._delay[0], self._delay[1] = seconds, loss

    def heal(self) -> None:
        """Connect all hosts, without delay and loss."""
        self.slow_down(0.0, 0.0)
        for host in range(len(self.names)):
            self.cut(host, off=False)

    def enter(self, host: int) -> None:
        """Move the calling thread, and what it starts, to a host, and give it that host's name."""
        with Path("/run/netns", self.names[host]).open("rb") as namespace:
            os.setns(namespace.fileno(), os.CLONE_NEWNET)
        os.unshare(os.CLONE_NEWUTS)
        socket.sethostname(f"host{host}")

    def __enter__(self) -> Self:
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        self._process.start()
        assert self._ready.wait(120), "the network did not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def _switch(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        devices = [self._device(host) for host in range(len(self.names))]
        self._ready.set()
        selector = selectors.DefaultSelector()
        for host, device in enumerate(devices):
            selector.register(device, selectors.EVENT_READ, host)
        waiting: list[tuple[float, int, int, bytes]] = []
        number, dice = itertools.count(), random.Random(0)
        while True:
            pause = waiting[0][0] - time.monotonic() if waiting else _SWITCH_TICK_SECONDS
            for key, _ in selector.select(max(0.0, min(pause, _SWITCH_TICK_SECONDS))):
                packet = os.read(key.fd, 65536)
                host = packet[19] - 1 if len(packet) > 19 and packet[0] >> 4 == 4 else -1
                if not 0 <= host < len(devices) or self._cut[key.data] or self._cut[host]:
                    continue
                if dice.random() >= self._delay[1]:
                    due = time.monotonic() + self._delay[0]
                    heapq.heappush(waiting, (due, next(number), host, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, host, packet = heapq.heappop(waiting)
                if not self._cut[host]:
                    os.write(devices[host], packet)

    def _device(self, host: int) -> int:
        self.enter(host)
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"eth0", _IFF_TUN | _IFF_NO_PI))
        for words in (
            f"addr add {self.addresses[host]}/24 dev eth0", "link set eth0 up", "link set lo up",
        ):  # fmt: skip
            subprocess.run(["ip", *words.split()], check=True)
        return device

    def run_ranks(self, rank_story: Callable[[], Any]) -> int:
        """Run a story on one rank per host, with torchrun's variables; return the exit status."""
        ranks = [
            mp.get_context("fork").Process(target=self._rank, args=(host, rank_story))
            for host in range(len(self.names))
        ]
        for rank in ranks:
            rank.start()
        # As torchrun and srun do: if a rank fails, the others get some time to end by themselves.
        while any(rank.exitcode is None for rank in ranks):
            time.sleep(0.1)
            if any(rank.exitcode for rank in ranks):
                deadline = time.monotonic() + LAUNCHER_SECONDS
                for rank in ranks:
                    rank.join(max(0.0, deadline - time.monotonic()))
                    if rank.exitcode is None:
                        rank.kill()
                break
        for number, rank in enumerate(ranks):
            rank.join()
            if (rank.exitcode or 0) < 0:
                ended_by = signal.Signals(-(rank.exitcode or 0)).name
                print(f"rank {number} was ended by {ended_by}", flush=True)
        return max(abs(rank.exitcode or 0) for rank in ranks)

    def _rank(self, host: int, rank_story: Callable[[], Any]) -> None:
        self.enter(host)
        os.environ |= {
            "RANK": str(host), "WORLD_SIZE": str(len(self.names)), "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29511",
            "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        rank_story()


def own_mounts() -> None:
    """Give the calling thread mounts of its own, as another host has."""
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
