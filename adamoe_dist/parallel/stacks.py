"""What the threads of this process are doing, seen from another thread of it."""

import linecache
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import adamoe_dist

_PACKAGE = Path(adamoe_dist.__file__).parent
_COMMUNICATION = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/c10d_logger.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/nn/functional.py",
    "deepspeed/comm/comm.py",
    "deepspeed/comm/torch.py",
)
_WRAPPERS = {"wrapper", "log_wrapper", "inner", "_fn"}
_WAIT = re.compile(r"\.wait\(")
_OWN_THREADS = {"watch", "pulse", "heartbeat"}
_LONGEST_STACK = 12_000


@dataclass(frozen=True)
class Doing:
    """What a process does: the function of torch.distributed that it is in, if any, and from where."""

    operation: str | None
    place: str
    """``file:line`` of the project that called the operation; without one, of the innermost Python frame."""
    stack: str = ""
    """Of all threads."""

    def __str__(self) -> str:
        if self.operation is None:
            return f"is not in a collective: {self.place}"
        return f"waits in {self.operation}, called from {self.place}"


def doing() -> Doing:
    """Look at the main thread, and where that waits in a backward pass also at autograd's own threads.

    Where collectives are asynchronous (NCCL) the host is not in them but where it waits for the device.
    """
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    assert main is not None
    seen = look_at(frames[main])
    if seen.operation is None:
        strangers = [i for i in frames if names.get(i, "Dummy").startswith("Dummy")]
        seen = next((s for s in map(look_at, map(frames.__getitem__, strangers)) if s.operation), seen)
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sorted(frames.items(), key=lambda item: item[0] != main)
        if names.get(ident) not in _OWN_THREADS
    ]
    return Doing(seen.operation, seen.place, "".join(parts)[:_LONGEST_STACK])


def look_at(frame: FrameType) -> Doing:
    """Say what one thread is doing from its innermost frame."""
    frames = list(_outwards(frame))
    ours = next((each for each in frames if Path(each.f_code.co_filename).is_relative_to(_PACKAGE)), None)
    inner = frames if ours is None else frames[: frames.index(ours) + 1]
    operation = next((each.f_code.co_name for each in inner if _communicates(each)), None)
    if operation is None and _WAIT.search(_line_of(frames[0])):
        operation = "wait"
    if operation is not None:
        caller = ours or next((each for each in inner if not _communicates(each, wrappers=True)), frames[-1])
        return Doing(operation, _place(caller))
    place = f"{_place(frames[0])} in {frames[0].f_code.co_name}"
    if ours is not None and ours is not frames[0]:
        place += f", called from {_place(ours)}"
    return Doing(None, place)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _communicates(frame: FrameType, wrappers: bool = False) -> bool:
    is_there = frame.f_code.co_filename.endswith(_COMMUNICATION)
    return is_there and (wrappers or frame.f_code.co_name not in _WRAPPERS)


def _line_of(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(_PACKAGE):
        path = path.relative_to(_PACKAGE.parent)
    elif "site-packages" in path.parts:
        path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
    return f"{path}:{frame.f_lineno}"
