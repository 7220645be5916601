"""TensorBoard's event files: records framed by their length and checksums."""

import io
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from adamoe_dist.files import replacing

_START = "events.out.tfevents."
_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


def new_event_file(directory: Path) -> Path:
    """Return a name that sorts behind those of earlier files, as TensorBoard reads them."""
    number = len(list(directory.glob(f"{_START}*")))
    return directory / f"{_START}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{number}"


def record_of(event: Event) -> bytes:
    """Return an event as it stands in a file."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def keep_events(directory: Path, last_step: int) -> None:
    """Drop the events of later steps from all files of a directory; where ``last_step`` is 0, the files.

    A record that was cut off, and what follows one that is damaged, is dropped too: nobody could read it.
    """
    for path in sorted(directory.glob(f"{_START}*")):
        if last_step == 0 or path.suffix == ".tmp":  # of a start that was killed
            path.unlink()
        else:
            _keep_events(path, last_step)


def _keep_events(path: Path, last_step: int) -> None:
    with path.open("rb") as old:
        kept = sum(len(record) for step, record in _records(old) if step <= last_step)
    if kept == path.stat().st_size:
        return
    with replacing(path) as unfinished, path.open("rb") as old, unfinished.open("wb") as new:
        new.writelines(record for step, record in _records(old) if step <= last_step)


def _records(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the step of each event and its whole record."""
    size = _LENGTH.size + _CHECKSUM.size
    while len(head := file.read(size)) == size:
        length = head[: _LENGTH.size]
        if _CHECKSUM.pack(masked_crc32c(length)) != head[_LENGTH.size :]:
            return
        (count,) = _LENGTH.unpack(length)
        body = file.read(count + _CHECKSUM.size)
        if len(body) < count + _CHECKSUM.size:
            return
        try:
            step = Event.FromString(body[:count]).step
        except DecodeError:
            return
        yield step, head + body
