"""Two network namespaces joined by one link of a given rate: two "nodes" on one Linux machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import IO

from adamoe_dist.errors import UserError

DEVICE = "link0"
ADDRESSES = ("10.254.17.1", "10.254.17.2")
"""Inside the namespaces only: the two ends of their link, which leads nowhere else."""

BURST = "128kb"


def require_network_tools() -> None:
    """Refuse where namespaces cannot be made.

    Raises:
        UserError: in one line, what is missing.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        raise UserError("network namespaces need root; run this benchmark as root")
    if missing:
        raise UserError(f"{' and '.join(missing)} not found; install iproute2")


class TwoNodes:
    """Two network namespaces and the link between them; a context that takes all of it down again.

    Every process that runs inside is killed at the end, whoever started it.
    """

    def __init__(self) -> None:
        self.names = tuple(f"adamoe-{os.getpid()}-{node}" for node in (0, 1))
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "TwoNodes":
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            first, second = self.names
            _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _run("ip", "-n", name, "address", "add", f"{address}/30", "dev", DEVICE)
                _run("ip", "-n", name, "link", "set", "lo", "up")
                _run("ip", "-n", name, "link", "set", DEVICE, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def limit(self, rate: str) -> None:
        """Let each end send at ``rate`` (``200mbit``, ``1gbit``) at most, or ``unlimited``.

        The burst that a link idle before may send at once is small beside one exchange: a large one would favour the
        model that sends less by more than what it sends less.
        """
        for name in self.names:
            queues = _run("ip", "netns", "exec", name, "tc", "qdisc", "show", "dev", DEVICE)
            if "tbf" in queues:
                _run("ip", "netns", "exec", name, "tc", "qdisc", "delete", "dev", DEVICE, "root")
            if rate != "unlimited":
                shape = ("tbf", "rate", rate, "burst", BURST, "latency", "50ms")
                _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", DEVICE, "root", *shape)

    def start(
        self, node: int, command: list[str], environment: dict[str, str], output: IO[str]
    ) -> subprocess.Popen[str]:
        """Start a process on one node; it sees the link and its own loopback, nothing else."""
        inside = ["ip", "netns", "exec", self.names[node], *command]
        process = subprocess.Popen(inside, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        self._started.append(process)
        return process

    def kill_processes(self) -> None:
        """Kill whatever runs in the namespaces and wait until it is gone."""
        for name in self.names:
            deadline = time.monotonic() + 10
            while (found := _processes(name)) and time.monotonic() < deadline:
                for process in found:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
                for child in self._started:
                    child.poll()

    def close(self) -> None:
        """Kill what runs inside and remove the namespaces; the link goes with them."""
        with deaf():
            self.kill_processes()
            for name in self.names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10)


def _processes(namespace: str) -> list[int]:
    answer = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, timeout=10)
    return [int(process) for process in answer.stdout.split()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


@contextlib.contextmanager
def signals_as_exits() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the program as an exit, so that contexts are left."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    # A shell starts background jobs with this one ignored.
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Ignore the signals that would interrupt a clean-up."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
