"""The connections on which a rank's end is seen, between threads of one process."""

import contextlib
import queue
import socket
import time
from dataclasses import replace

import pytest

from adamoe_dist.parallel import watch_server
from adamoe_dist.parallel.watch_server import Server
from adamoe_dist.parallel.watch_wire import ASKED_BY_USER, CONSEQUENCE, SPOKEN, Client, Departure, after, own_address

KEY = "the key"
SOON_S = 0.3


class Ranks:
    """Rank 0's server and clients for the others; what each is told arrives in its queue."""

    def __init__(self, world_size: int, late: tuple[int, ...] = ()) -> None:
        self.places = [Departure(rank, rank, 0, "here") for rank in range(world_size)]
        self.told: list[queue.Queue[Departure]] = [queue.Queue() for _ in range(world_size)]
        self.server = Server(KEY, world_size, self.told[0].put)
        self.server.start()
        self.clients = {rank: self.connect(rank) for rank in range(1, world_size) if rank not in late}

    def connect(self, rank: int) -> Client:
        address = ("127.0.0.1", self.server.port)
        client = Client([address], KEY, self.places[rank], self.places[0], self.told[rank].put)
        client.start()
        return client

    def die(self, rank: int) -> None:
        """What the kernel does to a killed process's connection."""
        self.clients[rank]._socket.shutdown(socket.SHUT_RDWR)

    def verdicts(self, *ranks: int) -> list[Departure]:
        return [self.told[rank].get(timeout=10) for rank in ranks]

    def nobody_hears(self) -> bool:
        time.sleep(3 * SOON_S)
        return all(told.empty() for told in self.told)


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    monkeypatch.setattr(watch_server, "SETTLE_S", SOON_S)


def test_everyone_hears_of_a_rank_that_died_without_a_word() -> None:
    ranks = Ranks(4)
    ranks.die(2)
    assert [verdict.rank for verdict in ranks.verdicts(0, 1, 3)] == [2, 2, 2]


def test_the_cause_is_what_a_rank_said_not_what_it_took_with_it() -> None:
    """Rank 3's lost connection is told first, rank 2 is killed by a launcher, rank 1 knows."""
    ranks = Ranks(4)
    ranks.clients[3].report(replace(ranks.places[3], cause="connection closed", kind=CONSEQUENCE))
    ranks.die(2)
    ranks.clients[1].report(replace(ranks.places[1], cause="ValueError: x", kind=SPOKEN, details="trace"))
    assert {(verdict.rank, verdict.details) for verdict in ranks.verdicts(0, 1, 3)} == {(1, "trace")}


def test_a_killed_rank_is_the_cause_of_lost_connections() -> None:
    ranks = Ranks(3)
    ranks.clients[1].report(replace(ranks.places[1], cause="connection closed", kind=CONSEQUENCE))
    ranks.die(2)
    assert {verdict.rank for verdict in ranks.verdicts(0, 1)} == {2}


def test_a_refusal_by_rank_0_is_told_at_once(monkeypatch) -> None:
    monkeypatch.setattr(watch_server, "SETTLE_S", 60)
    ranks = Ranks(3)
    ranks.server.report(replace(ranks.places[0], cause="no such file", code=2, kind=ASKED_BY_USER))
    assert {(verdict.code, verdict.cause) for verdict in ranks.verdicts(0, 1, 2)} == {(2, "no such file")}


def test_rank_0_waits_for_one_that_is_still_starting_and_tells_it_why_there_is_no_run() -> None:
    ranks = Ranks(3, late=(2,))
    ranks.server.report(replace(ranks.places[0], cause="no such file", code=2, kind=ASKED_BY_USER))
    assert {verdict.cause for verdict in ranks.verdicts(0, 1)} == {"no such file"}
    started = time.monotonic()
    ranks.server.wait_until_alone(0.0, SOON_S)
    assert time.monotonic() - started >= SOON_S, "rank 2 may still come"
    ranks.clients[2] = ranks.connect(2)
    assert ranks.verdicts(2)[0].cause == "no such file"
    started = time.monotonic()
    ranks.server.wait_until_alone(0.0, 60)
    assert time.monotonic() - started < 30


def test_goodbyes_end_nothing() -> None:
    ranks = Ranks(3)
    for client in ranks.clients.values():
        client.goodbye(1)
    started = time.monotonic()
    ranks.server.goodbye(30)
    assert time.monotonic() - started < 5
    for rank in ranks.clients:
        ranks.die(rank)
    assert ranks.nobody_hears()


def test_rank_0_waits_for_the_others_and_hears_of_one_that_dies_meanwhile() -> None:
    ranks = Ranks(3)
    ranks.clients[1].goodbye(1)
    ranks.die(1)
    ranks.die(2)
    ranks.server.goodbye(3 * SOON_S)
    assert ranks.verdicts(0)[0].rank == 2


def test_rank_0_gone_is_seen_by_each_alone() -> None:
    ranks = Ranks(3)
    for connection in list(ranks.server._places):
        connection.shutdown(socket.SHUT_RDWR)
    assert [verdict.rank for verdict in ranks.verdicts(1, 2)] == [0, 0]


def test_strangers_are_not_heard() -> None:
    ranks = Ranks(2)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"hello": "guess", "place": {}}\n', b"[]\n", b"x" * 200_000):
        with socket.create_connection(("127.0.0.1", ranks.server.port)) as stranger:
            stranger.sendall(words)
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
    ranks.die(1)
    assert ranks.verdicts(0)[0].rank == 1


def test_the_next_address_is_tried_and_a_stranger_at_one_is_passed_by() -> None:
    stranger = socket.create_server(("127.0.0.1", 0))
    closed = stranger.getsockname()
    stranger.close()
    ranks = Ranks(1)
    client = Client([closed, ("127.0.0.1", ranks.server.port)], KEY, ranks.places[0], ranks.places[0], print)
    client.goodbye(1)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1 port"):
        Client([closed], KEY, ranks.places[0], ranks.places[0], print)


def test_a_silent_machine_is_given_up_within_a_minute() -> None:
    """What the kernel was asked for; tests/end_to_end/test_two_nodes.py unplugs a cable."""
    ranks = Ranks(2)
    connection = ranks.clients[1]._socket
    idle, interval, count = (
        connection.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle + interval * count < 45
    assert connection.getsockopt(socket.IPPROTO_TCP, 18) == 30_000  # TCP_USER_TIMEOUT, of data that is not acknowledged


def test_a_reset_connection_is_a_killed_process_and_silence_a_machine() -> None:
    """The kernel resets a killed process's connection when something that it was sent was not read yet."""
    place = Departure(1, 1, 0, "here")
    assert after(place, ConnectionResetError()) == place
    assert "machine does not answer" in after(place, TimeoutError(110, "Connection timed out")).cause


def test_own_address_is_the_one_that_faces_the_host() -> None:
    assert own_address("127.0.0.1", 1) == "127.0.0.1"
