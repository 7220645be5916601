"""One TCP connection from each rank to rank 0, on which a rank's end is seen. No rank asks: all wait for the kernel.

Messages are JSON, one a line. A rank sends ``hello`` with its place, then, at its end, ``goodbye`` or its
:class:`Departure`; rank 0 answers ``welcome``, and sends the verdict or, when all is done, ``end``.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from adamoe_dist.errors import EXIT_BUG

SETTLE_S = 1.0
"""How long departures are collected before one is named: a dying rank takes others with it, in any order."""

SILENCE_S = 30
"""After which a machine that answers nothing is taken for gone."""

_CONNECT_S = 20.0
_LARGEST_MESSAGE = 1 << 16

ASKED_BY_USER, SPOKEN, SILENT, CONSEQUENCE = range(4)
"""Which of several departures is the cause: a refusal by rank 0, what a rank said itself, a rank that was killed, an
exception about a lost connection; of one kind the first."""


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
    """A traceback, if there is one."""


Verdict = Callable[[Departure], None]


class Server:
    """Rank 0's end: a thread that waits on all connections, and names the first rank that left.

    Args:
        key: what a connection must say to be heard.
        world_size: number of ranks.
        on_verdict: called in the thread with the departure that is the cause, after it was sent to every rank.
    """

    def __init__(self, key: str, world_size: int, on_verdict: Verdict) -> None:
        self._key = key
        self._on_verdict = on_verdict
        self._awaited = set(range(1, world_size))
        self._places: dict[socket.socket, Departure | None] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._departures: list[Departure] = []
        self._deadline: float | None = None
        self._lock = threading.Lock()
        self._decided = False
        self.finished = threading.Event()
        self._listener = _listen()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="watch", daemon=True)
        _close_in_children(self.sockets)

    @property
    def port(self) -> int:
        """Where the ranks connect to."""
        return int(self._listener.getsockname()[1])

    def sockets(self) -> list[socket.socket]:
        """All that are open."""
        return [self._listener, self._wake, self._woken, *self._places]

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def report(self, departure: Departure) -> None:
        """Say that rank 0 leaves early."""
        self._note(departure)
        self._wake.send(b"!")

    def goodbye(self, patience_s: float) -> None:
        """Rank 0 is done: wait until every rank is, and let go of them."""
        if self._awaited:
            self.finished.wait(patience_s)
        with self._lock:
            if self._decided:
                return
            self._decided = True
        for connection in list(self._places):
            _send(connection, {"end": True})

    def wait_until_alone(self, patience_s: float) -> None:
        """Wait until every rank that is there has gone."""
        end = time.monotonic() + patience_s
        while self._places and time.monotonic() < end:
            time.sleep(0.05)

    def _serve(self) -> None:
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            for ready, _ in self._selector.select(left):
                self._read(ready.fileobj)  # type: ignore[arg-type]
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._decide()

    def _decide(self) -> None:
        self._deadline = None
        with self._lock:
            if self._decided:
                return
            self._decided = True
        cause = min(self._departures, key=lambda departure: departure.kind)
        for connection, place in list(self._places.items()):
            if place is not None:
                _send(connection, {"verdict": asdict(cause)})
        self._on_verdict(cause)

    def _read(self, source: socket.socket) -> None:
        if source is self._listener:
            with contextlib.suppress(OSError):
                self._accept()
        elif source is self._woken:
            source.recv(64)
        else:
            self._receive(source)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        _keep_alive(connection)
        self._places[connection], self._unread[connection] = None, b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        place = self._places[connection]
        try:
            data = connection.recv(_LARGEST_MESSAGE)
        except OSError as problem:
            self._drop(connection)
            if place is not None and place.rank in self._awaited:
                self._note(replace(place, cause=f"its machine does not answer ({problem.strerror or problem})"))
            return
        if not data:
            self._drop(connection)
            if place is not None and place.rank in self._awaited:
                self._note(place)
            return
        *lines, self._unread[connection] = (self._unread[connection] + data).split(b"\n")
        for line in lines:
            if not self._hear(connection, line):
                self._drop(connection)
                return
        if len(self._unread[connection]) > _LARGEST_MESSAGE:
            self._drop(connection)

    def _hear(self, connection: socket.socket, line: bytes) -> bool:
        """Take one message; false for a connection that is none of ours."""
        place = self._places[connection]
        if place is None:
            try:
                message = json.loads(line)
                if message["hello"] != self._key:
                    return False
                self._places[connection] = Departure(**message["place"])
            except (ValueError, TypeError, KeyError):
                return False
            _send(connection, {"welcome": True})
            return True
        message = json.loads(line)
        if "departure" in message:
            self._note(Departure(**message["departure"]))
        self._awaited.discard(place.rank)
        if not self._awaited:
            self.finished.set()
        return True

    def _note(self, departure: Departure) -> None:
        self._departures.append(departure)
        if self._deadline is None:
            self._deadline = time.monotonic() + SETTLE_S
        if departure.kind == ASKED_BY_USER:
            self._deadline = time.monotonic()

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._places[connection], self._unread[connection]
        connection.close()


class Client:
    """Another rank's end: a thread that waits for what rank 0 says, or for rank 0 to be gone.

    Args:
        addresses: hosts by which rank 0 may be reached, and the port.
        key: what rank 0 must hear.
        place: this rank's place, and rank 0's.
        on_verdict: called in the thread with the departure that is the cause.

    Raises:
        ConnectionError: rank 0 answers on no address.
    """

    def __init__(
        self, addresses: Iterable[tuple[str, int]], key: str, place: Departure, rank_0: Departure, on_verdict: Verdict
    ) -> None:
        self._rank_0 = rank_0
        self._on_verdict = on_verdict
        self._is_done = False
        self._socket = _connect(addresses, {"hello": key, "place": asdict(place)})
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        _close_in_children(lambda: [self._socket])

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def report(self, departure: Departure) -> None:
        """Say that this rank leaves early, and why; if rank 0 is gone, the thread knows."""
        _send(self._socket, {"departure": asdict(departure)})

    def goodbye(self, patience_s: float) -> None:
        """Say that this rank is done."""
        self._is_done = True
        _send(self._socket, {"goodbye": True})

    def _listen(self) -> None:
        departure = self._rank_0
        try:
            with self._socket.makefile("rb") as messages:
                for line in messages:
                    message = json.loads(line)
                    if "end" in message:
                        return
                    if "verdict" in message:
                        self._on_verdict(Departure(**message["verdict"]))
                        return
        except OSError as problem:
            departure = replace(departure, cause=f"its machine does not answer ({problem.strerror or problem})")
        if not self._is_done:
            self._on_verdict(departure)


def own_address(host: str, port: int) -> str:
    """Return the address of this machine that faces ``host``: no packet is sent."""
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _connect(addresses: Iterable[tuple[str, int]], hello: dict[str, Any]) -> socket.socket:
    problems = []
    for address in addresses:
        try:
            connection = socket.create_connection(address, timeout=_CONNECT_S)
            if _send(connection, hello) and b"welcome" in connection.recv(_LARGEST_MESSAGE):
                connection.settimeout(None)
                _keep_alive(connection)
                return connection
            connection.close()
            problems.append(f"{address[0]} port {address[1]}: not rank 0")
        except OSError as problem:
            problems.append(f"{address[0]} port {address[1]}: {problem}")
    raise ConnectionError("; ".join(problems))


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel ask after a silent peer, and give up on one that does not answer within ``SILENCE_S``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 6)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)


def _send(connection: socket.socket, message: dict[str, Any]) -> bool:
    """Send one message, or return that the other side is gone (who reads from it learns that, too)."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True


def _close_in_children(sockets: Callable[[], list[socket.socket]]) -> None:
    """Close them in a forked child: while it lives, its copy would hide that this process died."""
    os.register_at_fork(after_in_child=lambda: [each.close() for each in sockets()])
