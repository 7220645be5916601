"""Starts ranks once and runs many checks in them.

A check is a function of a `Place`; it runs on every rank at the same time. Ranks are processes that stay up for a whole
test module, because importing torch, DeepSpeed and Megatron costs seconds.
"""

import contextlib
import gc
import logging
import multiprocessing as mp
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Check = Callable[..., Any]
MOST_GLOO_THREADS = 30
"""Of a rank whose groups are closed: gloo's stay for as long as anything refers to a group, and idle ones cost time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gloo_threads() -> int:
    """Of this process; the other threads are as many as the machine has cores."""
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum("gloo" in name for name in names)


def _serve(rank: int, world_size: int, pipe: Any, cuda: bool) -> None:
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from adamoe_dist import platform

    platform.prepare()
    while (task := pipe.recv()) is not None:
        check, arguments, os.environ["MASTER_PORT"] = task
        try:
            answer = pickle.dumps(check(*arguments))  # by value: no tensor in shared memory
            gc.collect()
            leaked = 0 if torch.distributed.is_initialized() else gloo_threads()
            assert leaked <= MOST_GLOO_THREADS, f"{leaked} gloo threads: something holds on to process groups after use"
            pipe.send(("ok", answer))
        except BaseException:
            pipe.send(("error", f"rank {rank}:\n{traceback.format_exc()}"))
            gc.collect()


class Ranks:
    """A set of rank processes: on CPU cores, also where there is CUDA, or each on a GPU of its own."""

    def __init__(self, world_size: int, cuda: bool = False) -> None:
        self.world_size = world_size
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(world_size)]
        self.pipes = [pair[0] for pair in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, pairs[rank][1], cuda), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, check: Check, *arguments: Any, timeout_s: float = 300.0) -> list[Any]:
        """Run ``check(*arguments)`` on every rank and return the results by rank."""
        port = str(free_port())
        for pipe in self.pipes:
            pipe.send((check, arguments, port))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(5.0 if errors else timeout_s):
                errors.append(f"rank {rank}: no answer")
                continue
            status, value = pipe.recv()
            if status == "ok":
                results.append(pickle.loads(value))
            else:
                errors.append(value)
        if errors:
            self.stop(kill=True)
            raise AssertionError("\n".join(errors))
        return results

    def stop(self, kill: bool = False) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


RanksOf = Callable[[int], Ranks]


@contextlib.contextmanager
def started_ranks(cuda: bool = False) -> Iterator[RanksOf]:
    """Give ``get(n)``: n running ranks, started when first asked for; a set that a failed check killed is replaced."""
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        ranks = started.get(world_size)
        if ranks is None or not all(process.is_alive() for process in ranks.processes):
            ranks = started[world_size] = Ranks(world_size, cuda)
        return ranks

    try:
        yield get
    finally:
        for ranks in started.values():
            ranks.stop(kill=True)
