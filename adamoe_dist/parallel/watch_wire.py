"""One TCP connection from each rank to rank 0, on which a rank's end is seen. No rank asks: all wait for the kernel.

Messages are JSON, one a line. A rank sends ``hello`` with its place, then, at its end, ``goodbye`` or its
:class:`Departure`; rank 0 answers ``welcome``, and sends the verdict or, when all is done, ``end``.

Where hangs are watched for, a rank says every few seconds when it last made progress, and rank 0 echoes that; rank 0
may ``ask`` what it is doing.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from adamoe_dist.errors import EXIT_BUG
from adamoe_dist.parallel.progress import Progress
from adamoe_dist.parallel.stacks import doing

SILENCE_S = 30
"""After which a machine that answers nothing is taken for gone."""

_CONNECT_S = 20.0
LARGEST_MESSAGE = 1 << 16

PULSE_S = 2.0
"""Between two words about a rank's progress."""

ANSWER_S = 10.0
"""How long a rank may take to answer; its thread needs no more than a turn of the interpreter."""

SILENT_RANK = "does not answer: its process is stopped or stuck outside Python, or its machine hangs"

ASKED_BY_USER, SPOKEN, HANGS, SILENT, CONSEQUENCE = range(5)
"""Which of several departures is the cause: a refusal by rank 0, what a rank said itself, a rank that hangs, one that
was killed, an exception about a lost connection; of one kind the first."""


@dataclass(frozen=True)
class Departure:
    """That a rank left, and why."""

    rank: int
    local_rank: int
    node: int
    host: str
    cause: str = "its process ended without a word (killed, or out of memory)"
    code: int = EXIT_BUG
    kind: int = SILENT
    details: str = ""
    """A traceback, or several, if there is one."""
    pid: int = 0


Verdict = Callable[[Departure], None]


class Client:
    """Another rank's end: a thread that waits for what rank 0 says, or for rank 0 to be gone.

    Args:
        addresses: hosts by which rank 0 may be reached, and the port.
        key: what rank 0 must hear.
        place: this rank's place, and rank 0's.
        on_verdict: called in the thread with the departure that is the cause.
        progress: what this rank does.
        hang_timeout_s: how long it may make no progress before a rank 0 that is silent hangs; None: no limit.

    Raises:
        ConnectionError: rank 0 answers on no address.
    """

    def __init__(
        self,
        addresses: Iterable[tuple[str, int]],
        key: str,
        place: Departure,
        rank_0: Departure,
        on_verdict: Verdict,
        progress: Progress | None = None,
        hang_timeout_s: float | None = None,
    ) -> None:
        self._rank_0 = rank_0
        self._progress = progress or Progress()
        self._hang_timeout_s = hang_timeout_s
        self._sending = threading.Lock()
        self._heard_at = time.monotonic()
        self._on_verdict = on_verdict
        self._is_done = False
        self._socket = connect(addresses, {"hello": key, "place": asdict(place)})
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        close_in_children(lambda: [self._socket])

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        if self._hang_timeout_s is not None:
            threading.Thread(target=self._pulse, args=(self._hang_timeout_s,), name="pulse", daemon=True).start()

    def report(self, departure: Departure) -> None:
        """Say that this rank leaves early, and why; if rank 0 is gone, the thread knows."""
        self._send({"departure": asdict(departure)})

    def goodbye(self, patience_s: float) -> None:
        """Say that this rank is done."""
        self._is_done = True
        self._send({"goodbye": True})

    def _send(self, message: dict[str, Any]) -> None:
        with self._sending:
            send(self._socket, message)

    def _pulse(self, hang_timeout_s: float) -> None:
        """Speak of progress; see that rank 0, which would notice any other rank that hangs, does not hang itself."""
        pause_s = min(PULSE_S, hang_timeout_s / 2)
        while not self._is_done:
            began = time.monotonic()
            time.sleep(pause_s)
            if (
                time.monotonic() > began + pause_s + PULSE_S
            ):  # this process was stopped: what rank 0 said is yet to be read
                self._heard_at = time.monotonic()
            if not self._progress.count:
                continue
            self._progress.note_traffic()
            age_s = self._progress.age_s
            self._send({"progress": age_s})
            if age_s > hang_timeout_s and time.monotonic() > self._heard_at + ANSWER_S and not self._is_done:
                cause = f"(no progress for {age_s:.0f} s) {SILENT_RANK}"
                departure = replace(self._rank_0, cause=cause, kind=HANGS)
                self.report(departure)  # it may go on some time
                self._on_verdict(departure)
                return

    def _listen(self) -> None:
        departure = self._rank_0
        try:
            with self._socket.makefile("rb") as messages:
                for line in messages:
                    message = json.loads(line)
                    self._heard_at = time.monotonic()
                    if "end" in message:
                        return
                    if "ask" in message:
                        self._send({"doing": asdict(doing())})
                    if "verdict" in message:
                        self._on_verdict(Departure(**message["verdict"]))
                        return
        except OSError as problem:
            departure = after(departure, problem)
        if not self._is_done:
            self._on_verdict(departure)


def after(place: Departure, problem: OSError) -> Departure:
    """Return what a failed connection says: reset by the kernel of a process that ended, or met by silence."""
    if isinstance(problem, ConnectionResetError | BrokenPipeError):
        return place
    return replace(place, cause=f"its machine does not answer ({problem.strerror or problem})")


def own_address(host: str, port: int) -> str:
    """Return the address of this machine that faces ``host``: no packet is sent."""
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def listen() -> socket.socket:
    """Open a port of all interfaces."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def connect(addresses: Iterable[tuple[str, int]], hello: dict[str, Any]) -> socket.socket:
    """Connect to the first address where rank 0 answers."""
    problems = []
    for address in addresses:
        try:
            connection = socket.create_connection(address, timeout=_CONNECT_S)
            if send(connection, hello) and b"welcome" in _first_line(connection):
                connection.settimeout(None)
                keep_alive(connection)
                return connection
            connection.close()
            problems.append(f"{address[0]} port {address[1]}: not rank 0")
        except OSError as problem:
            problems.append(f"{address[0]} port {address[1]}: {problem}")
    raise ConnectionError("; ".join(problems))


def _first_line(connection: socket.socket) -> bytes:
    """Read one message and nothing of what follows it, which the listening thread reads."""
    line = b""
    while not line.endswith(b"\n") and len(line) < LARGEST_MESSAGE and (byte := connection.recv(1)):
        line += byte
    return line


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel ask after a silent peer, and give up on one that does not answer within ``SILENCE_S``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 6)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)


def send(connection: socket.socket, message: dict[str, Any]) -> bool:
    """Send one message, or return that the other side is gone (who reads from it learns that, too)."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True


def close_in_children(sockets: Callable[[], list[socket.socket]]) -> None:
    """Close them in a forked child: while it lives, its copy would hide that this process died."""

    def close() -> None:
        for each in sockets():
            each.close()

    os.register_at_fork(after_in_child=close)
