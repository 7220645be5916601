"""All ranks leave when one does: a collective whose partner died waits for half an hour, or for ever.

Every rank keeps one connection to rank 0 (``watch_wire``). A rank that ends without a goodbye, by a signal, an
exception or with its machine, ends the whole run: each node's console shows the cause once, and every process is gone
seconds later, whatever it waits for. So does a rank that hangs (``watch_hang``).
"""

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from adamoe_dist.console import fail
from adamoe_dist.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_NUMERICAL_ERROR,
    EXIT_TERMINATED,
    EXIT_USER_ERROR,
    NumericalError,
    UserError,
)
from adamoe_dist.launcher import Launch
from adamoe_dist.parallel.groups import COLLECTIVE_TIMEOUT
from adamoe_dist.parallel.progress import Progress
from adamoe_dist.parallel.watch_hang import HangWatch
from adamoe_dist.parallel.watch_server import ARRIVAL_S, SETTLE_S, Server
from adamoe_dist.parallel.watch_wire import ASKED_BY_USER, CONSEQUENCE, HANGS, SPOKEN, Client, Departure, own_address

LEAVE_S = 2.0
"""Between the verdict and the end of a process that does not end by itself."""

GOODBYE_S = 60.0
"""How long rank 0, done, waits for ranks that are not."""

_LONGEST_CAUSE, _LONGEST_DETAILS = 2_000, 8_000
_LOST_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def watch_ranks(
    launch: Launch, progress: Progress | None = None, hang_timeout_s: float | None = None
) -> Iterator[None]:
    """Tie the ranks together for the length of a ``with`` block. One process is tied to nothing.

    It starts before the process groups, from the rendezvous store alone, so that a rank that dies on the way to them is
    seen too. With several ranks an exception does not leave the block: the process ends there, since the clean-up of
    groups waits for ranks that may be gone.

    Args:
        launch: this process's place.
        progress: what this rank marks; the watch for hangs begins with its first mark.
        hang_timeout_s: how long no rank may make progress; None: for ever.

    Raises:
        UserError: this machine cannot reach rank 0.
    """
    if launch.world_size == 1:
        yield
        return
    watch = _Watch(launch, progress or Progress(), hang_timeout_s)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    watch.link.goodbye(GOODBYE_S)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the program: the launcher's must not end a rank that is about to say why the run ends.

    For after the groups are there. Before, a rank waits for others where no Python runs, and is better killed.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Watch:
    """One rank's side."""

    def __init__(self, launch: Launch, progress: Progress, hang_timeout_s: float | None) -> None:
        self._launch = launch
        self._progress = progress
        self._hang_timeout_s = hang_timeout_s
        self._verdict: Departure | None = None
        self._decided = threading.Event()
        self._deciding = threading.Lock()
        self._place = Departure(launch.rank, launch.local_rank, launch.node, socket.gethostname(), pid=os.getpid())
        self._store = _open_store(launch)  # kept: rank 0's process serves it
        self.link: Server | Client = self._serve() if launch.rank == 0 else self._connect()
        self.link.start()

    def _serve(self) -> Server:
        key = secrets.token_hex(16)
        limit_s = self._hang_timeout_s
        hang = None if limit_s is None else HangWatch(self._place, self._progress, limit_s)
        server = Server(key, self._launch.world_size, self._on_verdict, hang)
        master = os.environ["MASTER_ADDR"]
        hosts = [own_address(master, int(os.environ["MASTER_PORT"])), master]
        published = {"hosts": hosts, "port": server.port, "key": key, "host": self._place.host}
        self._store.set("rank_0", json.dumps({**published, "node": self._place.node, "pid": self._place.pid}))
        return server

    def _connect(self) -> Client:
        rank_0 = json.loads(self._store.get("rank_0"))
        addresses = [(host, rank_0["port"]) for host in dict.fromkeys(rank_0["hosts"])]
        theirs = Departure(rank=0, local_rank=0, node=rank_0["node"], host=rank_0["host"], pid=rank_0["pid"])
        watched = (self._on_verdict, self._progress, self._hang_timeout_s)
        try:
            return Client(addresses, rank_0["key"], self._place, theirs, *watched)
        except ConnectionError as problem:
            refusal = (
                f"rank {self._launch.rank} on {self._place.host} does not reach rank 0 ({problem}); let the nodes "
                "reach each other on all TCP ports, or give an address that they share: deepspeed --master_addr HOST"
            )
            fail(refusal)  # here: refusals are shown by rank 0, which cannot hear of this one
            raise UserError(refusal) from None

    def fail(self, error: BaseException) -> None:
        """Tell the others what ended this rank, and end it, with the cause that all agree on."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        departure = self._describe(error)
        if departure.rank != 0 and departure.kind == SPOKEN and departure.details:  # rank 0 logs the verdict
            logger.debug("error: %s\n%s", _line(departure), departure.details, extra={"is_own": True})
        self.link.report(departure)
        self._decided.wait(2 * SETTLE_S)
        verdict = self._verdict or departure
        if verdict == departure and verdict.kind != ASKED_BY_USER:
            sys.stderr.write(departure.details)
        if self._verdict is None:  # rank 0 is done, or cannot be told
            fail(_line(departure))
        self._leave(verdict)

    def _describe(self, error: BaseException) -> Departure:
        if isinstance(error, UserError | NumericalError):
            code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_NUMERICAL_ERROR
            kind = ASKED_BY_USER if self._launch.rank == 0 else SPOKEN
            return replace(self._place, cause=" ".join(str(error).split())[:_LONGEST_CAUSE], code=code, kind=kind)
        if isinstance(error, KeyboardInterrupt):
            return replace(self._place, cause="interrupted", code=EXIT_INTERRUPTED, kind=SPOKEN)
        if isinstance(error, SystemExit):
            return replace(self._place, cause="stopped by SIGTERM", code=EXIT_TERMINATED, kind=CONSEQUENCE)
        lost = isinstance(error, dist.DistError | ConnectionError)
        lost = lost or (isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None)
        cause = " ".join("".join(traceback.format_exception_only(error)).split())[:_LONGEST_CAUSE]
        details = "".join(traceback.format_exception(error))[-_LONGEST_DETAILS:]
        kind = CONSEQUENCE if lost else SPOKEN
        return replace(self._place, cause=cause, code=EXIT_BUG, kind=kind, details=details)

    def _on_verdict(self, departure: Departure) -> None:
        """Show the cause and see that this process ends; in the link's thread, whatever the main thread waits for."""
        with self._deciding:
            if self._verdict is not None:  # rank 0 hung, and goes on
                return
            self._verdict = departure
        if self._speaks_of(departure):
            fail(_line(departure))
        logger.debug("error: %s\n%s", _line(departure), departure.details)
        self._decided.set()
        self._progress.end(departure.code)
        self._let_go_on(departure)
        time.sleep(LEAVE_S)
        self._leave(departure)

    def _let_go_on(self, departure: Departure) -> None:
        """Continue a stopped rank of the same launcher: it hears the verdict and ends, or is ended by the launcher."""
        if departure.kind == HANGS and departure.rank != self._launch.rank and departure.host == self._place.host:
            state, parent = _state_of(departure.pid)
            if state in "Tt" and parent == os.getppid():
                os.kill(departure.pid, signal.SIGCONT)

    def _speaks_of(self, departure: Departure) -> bool:
        """Whether this rank shows the cause: one on each node does, the first that is not the one that left."""
        here = (departure.node, departure.host) == (self._place.node, self._place.host)
        if departure.kind == ASKED_BY_USER:
            return self._launch.local_rank == 0
        return self._launch.local_rank == (1 if here and departure.local_rank == 0 else 0)

    def _leave(self, verdict: Departure) -> None:
        """End this process, whatever its other threads do; rank 0 goes last, for the others hear of it from there."""
        arrival_s = 0.0
        if isinstance(self.link, Server) and verdict.kind == ASKED_BY_USER:
            arrival_s = ARRIVAL_S
        # should an output that nobody reads block
        threading.Timer(arrival_s + 2 * LEAVE_S + 1, os._exit, (verdict.code,)).start()
        if isinstance(self.link, Server):
            self.link.wait_until_alone(LEAVE_S + 1, arrival_s)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(verdict.code)


def _line(departure: Departure) -> str:
    if departure.kind == ASKED_BY_USER:
        return departure.cause
    if departure.kind == HANGS:
        return f"rank {departure.rank} on {departure.host} hangs {departure.cause}"
    return f"rank {departure.rank} on {departure.host} left: {departure.cause}"


def _state_of(pid: int) -> tuple[str, int]:
    """Return a process's state, as the kernel abbreviates it, and its parent; nothing for one that is not there."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
    except OSError:
        return "?", 0
    return state, int(parent)


def _open_store(launch: Launch) -> dist.Store:
    """Open the store at MASTER_ADDR and MASTER_PORT that the process groups will use as well."""
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        launch.world_size,
        is_master=launch.rank == 0 and not served_by_agent,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"adamoe_watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
