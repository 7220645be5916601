"""What a rank that hangs is told from: stacks of live threads, answers of ranks, progress in connections."""

import contextlib
import datetime
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from adamoe_dist.parallel import TRAINING, Progress, watch_hang, watch_wire
from adamoe_dist.parallel import stacks as stacks_module
from adamoe_dist.parallel.progress import LEAST_TRAFFIC
from adamoe_dist.parallel.stacks import Doing, doing, look_at
from adamoe_dist.parallel.watch_hang import HangWatch, complaint, culprits
from adamoe_dist.parallel.watch_server import Server
from adamoe_dist.parallel.watch_wire import HANGS, Client, Departure

AT_SUM = Doing("all_reduce", "adamoe_dist/training/loop.py:1")
AT_EXCHANGE = Doing("all_to_all_single", "adamoe_dist/dispatch/exchange.py:2")
OUTSIDE = Doing(None, "mine.py:3 in next_step")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0: AT_SUM, 1: AT_SUM}, [2]),
        ({0: AT_SUM, 1: OUTSIDE}, [2]),
        ({0: AT_SUM, 1: OUTSIDE, 2: AT_SUM}, [1]),
        ({0: AT_SUM, 1: AT_SUM, 2: AT_EXCHANGE}, [2]),
        ({0: AT_EXCHANGE, 1: AT_SUM, 2: Doing("all_reduce", "elsewhere:9")}, [0, 1, 2]),
        ({0: AT_SUM, 1: AT_SUM, 2: AT_SUM}, [0, 1, 2]),
        ({0: OUTSIDE, 1: OUTSIDE, 2: AT_SUM}, [0, 1]),
    ],
)
def test_culprits(answers: dict[int, Doing], expected: list[int]) -> None:
    assert culprits([0, 1, 2], answers) == expected


def test_a_complaint_says_what_the_others_do() -> None:
    words = complaint(2, [], [0, 1, 2, 3], {0: AT_SUM, 1: AT_SUM, 2: OUTSIDE, 3: AT_SUM})
    assert words.startswith("is not in a collective: mine.py:3 in next_step; 3 other ranks: waits in all_reduce")
    assert "rank 3 does not answer" in complaint(1, [3], [0, 1, 3], {0: AT_SUM})


@contextlib.contextmanager
def waiting_pair() -> Iterator[dist.ProcessGroup]:
    """A group of two of which the other one never comes."""
    store = dist.HashStore()
    groups: list[dist.ProcessGroup] = []
    other = threading.Thread(target=lambda: groups.append(dist.ProcessGroupGloo(store, 1, 2)))
    other.start()
    mine = dist.ProcessGroupGloo(store, 0, 2)
    other.join()
    yield mine


def test_a_wait_is_seen_and_a_loop_is_named_by_its_line() -> None:
    """Of threads, since the main one runs the test; what is in torch.distributed itself a whole run shows."""
    stop = threading.Event()

    def loops() -> None:
        while not stop.is_set():
            sum(range(1000))

    def waits() -> None:
        with waiting_pair() as group:
            work = group.allreduce([torch.ones(1)])
            with contextlib.suppress(RuntimeError):
                work.wait(datetime.timedelta(seconds=3))

    found = {}
    for body in (loops, waits):
        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        time.sleep(1.0)
        assert thread.ident is not None
        found[body.__name__] = look_at(stacks_module.sys._current_frames()[thread.ident])
    stop.set()
    assert found["loops"].operation is None and f"{os.path.basename(__file__)}:" in found["loops"].place
    assert found["waits"].operation == "wait"


def test_the_main_thread_is_looked_at_and_every_stack_is_there() -> None:
    answers: queue.Queue[Doing] = queue.Queue()
    threading.Thread(target=lambda: answers.put(doing())).start()
    seen = answers.get(timeout=10)
    assert seen.operation is None and "test_the_main_thread_is_looked_at" in seen.stack


def test_files_that_grow_are_progress_between_steps_only(tmp_path) -> None:
    progress = Progress()
    progress.enter("saving")
    progress.note_traffic()
    for phase, expected in ((TRAINING, 0), ("saving", 1)):
        progress.phase = phase
        count = progress.count
        (tmp_path / "file").write_bytes(bytes(2 * LEAST_TRAFFIC))
        progress.note_traffic()
        assert progress.count - count == expected, phase
    count = progress.count
    progress.note_traffic()
    assert progress.count == count, "nothing was written"


class Watched:
    """Rank 0's server and one client, each with the progress of its rank; their verdicts arrive in a queue."""

    def __init__(self, timeout_s: float) -> None:
        self.progress = [Progress(), Progress()]
        self.told: queue.Queue[Departure] = queue.Queue()
        places = [Departure(rank, rank, 0, "here") for rank in range(2)]
        self.server = Server("key", 2, self.told.put, HangWatch(places[0], self.progress[0], timeout_s))
        self.server.start()
        address = [("127.0.0.1", self.server.port)]
        self.theirs: queue.Queue[Departure] = queue.Queue()
        self.client = Client(address, "key", places[1], places[0], self.theirs.put, self.progress[1], timeout_s)
        self.client.start()

    def work(self, rank: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.progress[rank].advance()
            time.sleep(0.02)


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    monkeypatch.setattr(watch_wire, "PULSE_S", 0.1)
    monkeypatch.setattr(watch_wire, "ANSWER_S", 1.0)
    monkeypatch.setattr(watch_hang, "ANSWER_S", 1.0)


def test_one_rank_that_gets_on_is_enough_and_then_the_hang_is_told_with_all_stacks() -> None:
    watched = Watched(0.6)
    watched.work(0, 1.5)
    watched.work(1, 2.5)
    assert watched.told.empty() and watched.theirs.empty()
    verdict, theirs = watched.told.get(timeout=10), watched.theirs.get(timeout=10)
    assert verdict.kind == theirs.kind == HANGS and verdict.cause == theirs.cause
    assert verdict.details.count("rank ") >= 2 and theirs.details == ""


def test_before_the_first_step_nobody_hangs() -> None:
    watched = Watched(0.3)
    time.sleep(1.5)
    assert watched.told.empty() and watched.theirs.empty()


def test_a_rank_that_does_not_answer_is_the_one() -> None:
    watched = Watched(0.6)
    for progress in watched.progress:
        progress.advance()
    time.sleep(0.4)
    watched.client._sending.acquire()  # as a stopped process sends nothing
    verdict = watched.told.get(timeout=10)
    assert verdict.rank == 1 and "does not answer" in verdict.cause
    watched.client._sending.release()


def test_a_rank_0_that_is_silent_is_found_by_the_others() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def welcome() -> None:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b'{"welcome": true}\n')
        kept.append(connection)

    kept: list[socket.socket] = []
    threading.Thread(target=welcome).start()
    places = [Departure(rank, rank, 0, "here") for rank in range(2)]
    told: queue.Queue[Departure] = queue.Queue()
    progress = Progress()
    client = Client([listener.getsockname()], "key", places[1], places[0], told.put, progress, 0.5)
    client.start()
    progress.advance()
    verdict = told.get(timeout=10)
    assert (verdict.rank, verdict.kind) == (0, HANGS)
    for each in (listener, *kept):
        each.close()
