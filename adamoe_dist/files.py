"""Files that are whole at any time, also where a disk is full or a process is killed."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from adamoe_dist.errors import UserError

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


def check_output_files(
    files: Iterable[tuple[str, Path]], overwrite: bool = True, others: Iterable[tuple[str, Path]] = ()
) -> None:
    """Refuse places where :func:`write_files` could not write, before there is anything to write.

    Args:
        files: the option that named it, and the place, of each file.
        overwrite: whether a file that is there may be replaced.
        others: further places, as of inputs, that none of the files may be.

    Raises:
        UserError: one is a directory, in none, may not be written, is there, or is another one's place.
    """
    taken = list(others)
    for option, path in files:
        _check_place(option, path, overwrite)
        for other, place in taken:
            if path.resolve() == place.resolve():
                raise UserError(f"{option} {path} is {other} {place} as well; choose another place")
        taken.append((option, path))


def _check_place(option: str, path: Path, overwrite: bool) -> None:
    target = path.resolve()
    if target.is_dir():
        raise UserError(f"{option} {path} is a directory; name a file in it")
    if not target.parent.is_dir():
        raise UserError(f"{option} {path}: its directory does not exist; make it first")
    if target.exists() and not _is_special(target) and not overwrite:
        raise UserError(f"{option} {path} exists already; choose another name or add --overwrite")
    needed = [*([target] if target.exists() else []), *([] if _is_special(target) else [target.parent])]
    if not all(os.access(place, os.W_OK) for place in needed):
        raise UserError(f"{option} {path} cannot be written; choose another place")


def write_files(files: Iterable[tuple[str, Path, bytes]]) -> None:
    """Write files that appear when all of them are whole; what was in their places stays until then.

    Args:
        files: the option that named it, the place and the content of each; a link means what it points to, and what is
            no ordinary file (as ``/dev/stdout``) is written to directly.

    Raises:
        UserError: one cannot be written; nothing is left of any.
    """
    unfinished: dict[Path, tuple[str, Path]] = {}
    try:
        for option, path, content in files:
            target = path.resolve()
            place = target if _is_special(target) else target.with_name(f".{target.name}.{os.getpid()}.tmp")
            if place != target:
                unfinished[target] = option, place
            with refusing(option, path):
                place.write_bytes(content)
        for target, (option, place) in unfinished.items():
            with refusing(option, target):
                place.replace(target)
    finally:
        for _, place in unfinished.values():
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)


@contextlib.contextmanager
def refusing(option: str, path: Path) -> Iterator[None]:
    """Make a system's error about the place that an option names a refusal.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except OSError as problem:
        raise UserError(f"{option} {path} cannot be written ({problem.strerror}); choose another place") from problem


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


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
