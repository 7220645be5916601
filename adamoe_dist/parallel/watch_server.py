"""Rank 0's end of the connections on which a rank's end is seen."""

import contextlib
import json
import selectors
import socket
import threading
import time
from dataclasses import asdict, replace

from adamoe_dist.parallel.stacks import Doing
from adamoe_dist.parallel.watch_hang import HangWatch
from adamoe_dist.parallel.watch_wire import (
    ASKED_BY_USER,
    HANGS,
    LARGEST_MESSAGE,
    PULSE_S,
    Departure,
    Verdict,
    after,
    close_in_children,
    keep_alive,
    listen,
    send,
)

SETTLE_S = 1.0
"""How long departures are collected before one is named: a dying rank takes others with it, in any order."""

ARRIVAL_S = 20.0
"""How long ranks that are still starting are waited for, to be told why there is no run."""


class Server:
    """Rank 0's end: a thread that waits on all connections, and names the first rank that left.

    Args:
        key: what a connection must say to be heard.
        world_size: number of ranks.
        on_verdict: called in a thread with the departure that is the cause, after it was sent to every rank that is
            there; one that comes later is told when it comes.
        hang: judges whether the run gets on; None: nobody does.
    """

    def __init__(self, key: str, world_size: int, on_verdict: Verdict, hang: HangWatch | None = None) -> None:
        self._key = key
        self._on_verdict = on_verdict
        self._hang = hang
        self._awaited = set(range(1, world_size))
        self._expected = set(self._awaited)  # have not come yet
        self._places: dict[socket.socket, Departure | None] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._departures: list[Departure] = []
        self._deadline: float | None = None
        self._lock = threading.Lock()
        self._decided = False
        self._verdict: Departure | None = None
        self.finished = threading.Event()
        self._listener = listen()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="watch", daemon=True)
        close_in_children(self.sockets)

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
            send(connection, {"end": True})

    def wait_until_alone(self, patience_s: float, arrival_s: float = 0.0) -> None:
        """Wait until every rank has come, for so long at most, and then until all that are there have gone."""
        come = time.monotonic() + arrival_s
        while self._expected and time.monotonic() < come:
            time.sleep(0.05)
        end = time.monotonic() + patience_s
        while self._places and time.monotonic() < end:
            time.sleep(0.05)

    def _serve(self) -> None:
        while True:
            left = None if self._hang is None else PULSE_S / 4
            if self._deadline is not None:
                left = max(0.0, self._deadline - time.monotonic())
            for ready, _ in self._selector.select(left):
                self._read(ready.fileobj)  # type: ignore[arg-type]
            if self._hang is not None and not self._departures:
                self._look_for_hang(self._hang)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._decide()

    def _look_for_hang(self, hang: HangWatch) -> None:
        hang.note_own()
        others = {place.rank: (each, place) for each, place in self._places.items() if place is not None}
        others = {rank: other for rank, other in others.items() if rank in self._awaited}
        if hang.is_to_ask():
            for connection, _ in others.values():
                send(connection, {"ask": True})
        if hang.has_heard(others):
            self._note(hang.verdict({rank: place for rank, (_, place) in others.items()}))

    def _decide(self) -> None:
        self._deadline = None
        with self._lock:
            if self._decided:
                return
            self._decided = True
        self._verdict = min(self._departures, key=lambda departure: departure.kind)
        for connection, place in list(self._places.items()):
            if place is not None:
                self._tell(connection, self._verdict)
        threading.Thread(target=self._on_verdict, args=(self._verdict,), name="verdict", daemon=True).start()

    def _tell(self, connection: socket.socket, verdict: Departure) -> None:
        send(connection, {"verdict": asdict(replace(verdict, details="") if verdict.kind == HANGS else verdict)})

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
        keep_alive(connection)
        self._places[connection], self._unread[connection] = None, b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        place = self._places[connection]
        try:
            data = connection.recv(LARGEST_MESSAGE)
        except OSError as problem:
            self._drop(connection)
            if place is not None and place.rank in self._awaited:
                self._note(after(place, problem))
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
        if len(self._unread[connection]) > LARGEST_MESSAGE:
            self._drop(connection)

    def _hear(self, connection: socket.socket, line: bytes) -> bool:
        """Take one message; false for a connection that is none of ours."""
        place = self._places[connection]
        try:
            message = json.loads(line)
            if place is None:
                if message["hello"] != self._key:
                    return False
                place = self._places[connection] = Departure(**message["place"])
                self._expected.discard(place.rank)
                send(connection, {"welcome": True})
                if self._verdict is not None:
                    self._tell(connection, self._verdict)
                return True
            if self._hang is not None and "progress" in message:
                self._hang.note(place.rank, float(message["progress"]))
                send(connection, {"pulse": True})
                return True
            if self._hang is not None and "doing" in message:
                self._hang.answer(place.rank, Doing(**message["doing"]))
                return True
            if "departure" in message:
                self._note(Departure(**message["departure"]))
        except (ValueError, TypeError, KeyError):
            return False
        self._awaited.discard(place.rank)
        if not self._awaited:
            self.finished.set()
        return True

    def _note(self, departure: Departure) -> None:
        self._departures.append(departure)
        if self._deadline is None:
            self._deadline = time.monotonic() + SETTLE_S
        if departure.kind in (ASKED_BY_USER, HANGS):
            self._deadline = time.monotonic()

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._places[connection], self._unread[connection]
        connection.close()
