"""Files that are whole at any time, also where a disk is full or a process is killed."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` for what takes its place when the block ends well; else nothing is left of it."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


class RecordFile:
    """A file that records are added to, each as a whole or not at all.

    It is for what a run can do without: a disk that refuses is a warning, once, and the next record is tried again.
    """

    def __init__(self, path: Path, prepare: Callable[[], None], head: bytes = b"") -> None:
        """Open ``path`` to add to.

        Args:
            path: the file; its directory is made where it is missing.
            prepare: called before, as often as it fails with an OSError: makes of earlier content what is to stay.
            head: what an empty file begins with.
        """
        self._path, self._prepare, self._head = path, prepare, head
        self._file: io.FileIO | None = None
        self._end = 0
        self._is_refused = False
        self.add(b"")

    def add(self, record: bytes) -> None:
        """Add a record; it is in the hands of the system when this returns, or lost."""
        try:
            self._put(self._opened(), record)
        except OSError as problem:
            if not self._is_refused:
                logger.warning(
                    "warning: %s is not written (%s); the training goes on, and its numbers are missing there until it "
                    "is written again",
                    self._path,
                    problem.strerror or problem,
                )
            self._is_refused = True
            return
        if self._is_refused:
            logger.warning("%s is written again", self._path)
        self._is_refused = False

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._prepare()
            self._file = io.FileIO(self._path, "ab")
            self._end = os.fstat(self._file.fileno()).st_size
        if self._end == 0:
            self._put(self._file, self._head)
        return self._file

    def _put(self, file: io.FileIO, record: bytes) -> None:
        if os.fstat(file.fileno()).st_size != self._end:  # of a record that failed
            file.truncate(self._end)
        left = memoryview(record)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(self._end)
            raise
        self._end += len(record)
