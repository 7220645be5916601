"""Where messages go: rank 0's console and ``log.txt``, a file of its own for each other rank.

==================================  ====================  ==========================================
message                             rank 0                other ranks
==================================  ====================  ==========================================
facts of the run                    console, ``log.txt``
warnings                            console, ``log.txt``  ``logs/rank_0001.txt``
errors                              console, ``log.txt``  console, ``logs/rank_0001.txt``
libraries' warnings, each one once  console, ``log.txt``  ``logs/rank_0001.txt``
where a rank runs, how it ended     ``log.txt``           ``logs/rank_0001.txt``
tracebacks                          ``log.txt``           ``logs/rank_0001.txt``, of the rank's own
==================================  ====================  ==========================================

What ends a run is printed by those who find it, not logged (:mod:`adamoe_dist.parallel.watch`). Imports no torch: the
libraries' warnings begin when they are imported.
"""

import contextlib
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from adamoe_dist.console import above_bars, is_terminal
from adamoe_dist.launcher import Launch

PACKAGE = "adamoe_dist"
LONGEST_ON_CONSOLE = 240
"""Characters of a library's warning there."""

OWN = {"is_own": True}
"""The ``extra`` of a message that is of this rank alone: other ranks' files have it whatever its level."""

_MOST_DISTINCT, _MOST_KEPT = 1000, 1000


def rank_log(run_dir: Path, rank: int) -> Path:
    """Return the file of a rank's own messages."""
    return run_dir / "log.txt" if rank == 0 else run_dir / "logs" / f"rank_{rank:04d}.txt"


class Logs:
    """The logging of this process while a run lasts; what it was before comes back when the ``with`` block ends."""

    def __init__(self, launch: Launch) -> None:
        """Prepare for a rank."""
        self._launch = launch
        self._console, self._file = _Console(launch.rank), _File(launch.rank)
        self._libraries = _Libraries([self._console, self._file] if launch.rank == 0 else [self._file])
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Logs":
        """Begin to show messages; those for the file are kept until :meth:`open_file`."""
        package = logging.getLogger(PACKAGE)
        self._undo.callback(_restore, package, package.handlers, package.propagate, package.level)
        package.handlers, package.propagate = [self._console, self._file], False
        package.setLevel(logging.DEBUG)
        logging.getLogger().addHandler(self._libraries)
        self._undo.callback(logging.getLogger().removeHandler, self._libraries)
        self._undo.callback(setattr, warnings, "showwarning", warnings.showwarning)
        warnings.showwarning = _log_warning
        self.take_over_libraries()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._undo.close()
        self._file.close()

    def take_over_libraries(self) -> None:
        """Have libraries that were imported meanwhile log as all do, not each to the terminal in its own way.

        What ``TORCH_LOGS`` asks torch for is left as it is.
        """
        for name, logger in list(logging.Logger.manager.loggerDict.items()):
            library = name.partition(".")[0]
            if not isinstance(logger, logging.Logger) or library == PACKAGE:
                continue
            if library == "torch" and "TORCH_LOGS" in os.environ:
                continue
            others = [handler for handler in logger.handlers if not _is_terminals(handler)]
            if len(others) < len(logger.handlers):
                self._undo.callback(_restore, logger, logger.handlers, logger.propagate, logger.level)
                logger.handlers, logger.propagate = others, True

    def open_file(self, run_dir: Path) -> None:
        """Write this rank's file from now on, with what was kept for it."""
        self._file.open(rank_log(run_dir, self._launch.rank))


def _restore(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int) -> None:
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


class _Console(logging.Handler):
    """Rank 0's standard output, the other ranks' standard error; above the progress bar."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.ERROR)
        self._start = "" if rank == 0 else f"rank {rank}: "
        self._is_rank_0 = rank == 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        stream = sys.stdout if self._is_rank_0 else sys.stderr
        try:
            text = self._text(record, stream)
            with above_bars(stream):
                stream.write(f"{self._start}{text}\n")
                stream.flush()
        except Exception:
            self.handleError(record)

    def _text(self, record: logging.LogRecord, stream: TextIO) -> str:
        fitted = getattr(record, "fitted", None)
        if fitted is not None and is_terminal(stream):
            return str(fitted(shutil.get_terminal_size().columns))
        if _is_ours(record):
            return record.getMessage()
        text = _library_text(record)
        return text if len(text) <= LONGEST_ON_CONSOLE else f"{text[:LONGEST_ON_CONSOLE]}... (whole in log.txt)"


class _File(logging.Handler):
    """A rank's file. Rank 0's has everything, the others' what is not the same on all ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.DEBUG)
        self._rank = rank
        self._kept: list[logging.LogRecord] = []
        self._target: _MadeWhenNeeded | None = None

    def open(self, path: Path) -> None:
        """Write to ``path``; rank 0's file is made at once, another's with the first message."""
        self._target = _MadeWhenNeeded(path, is_made_now=self._rank == 0)
        for record in self._kept:
            self._target.emit(record)
        self._kept.clear()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, or keep it."""
        if self._rank and record.levelno < logging.WARNING and not getattr(record, "is_own", False):
            return
        if self._target is not None:
            self._target.emit(record)
        elif len(self._kept) < _MOST_KEPT:
            self._kept.append(record)

    def close(self) -> None:
        """Close the file."""
        if self._target is not None:
            self._target.close()
        super().close()


class _MadeWhenNeeded(logging.FileHandler):
    """A log file, with its directory. One that can no longer be written is said once, and ends no run."""

    def __init__(self, path: Path, is_made_now: bool) -> None:
        self._is_refused = False
        super().__init__(path, encoding="utf-8", delay=not is_made_now)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if self._is_refused:
            return
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line with its time; a library's with its place as well."""
        formatter = logging.Formatter("%(asctime)s")
        text = record.getMessage() if _is_ours(record) else f"{_library_text(record)} ({_place(record)})"
        trace = f"\n{formatter.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{formatter.formatTime(record)} {text}{trace}"

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the file cannot be written."""
        problem = sys.exc_info()[1]
        if isinstance(problem, OSError):
            self._is_refused = True
            sys.stderr.write(f"warning: {self.baseFilename} is not written: {problem}\n")
        else:
            super().handleError(record)


class _Libraries(logging.Handler):
    """Passes the warnings of libraries on, each distinct one once."""

    def __init__(self, targets: list[logging.Handler]) -> None:
        super().__init__(logging.WARNING)
        self._targets = targets
        self._seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a message on if it is new; errors always."""
        key = (_library(record), record.getMessage())
        if record.levelno < logging.ERROR:
            if key in self._seen or len(self._seen) > _MOST_DISTINCT:
                return
            self._seen.add(key)
        for target in self._targets:
            target.handle(record)
        if len(self._seen) == _MOST_DISTINCT:
            self._seen.add(("", ""))
            logging.getLogger(PACKAGE).warning(
                "warning: no more warnings of libraries are shown: too many different ones"
            )


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Take the place of ``warnings.showwarning``."""
    if file is not None:
        file.write(warnings.formatwarning(message, category, filename, lineno, line))
        return
    origin = {"library": _package_of(filename), "place": f"{category.__name__} at {filename}:{lineno}"}
    logging.getLogger("py.warnings").warning("%s", message, extra=origin)


def _package_of(filename: str) -> str:
    """Return the name of the installed package that a file is part of, or else the file's."""
    parts = Path(filename).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            return parts[parts.index(folder) + 1].removesuffix(".py")
    return Path(filename).stem


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == PACKAGE


def _library(record: logging.LogRecord) -> str:
    return str(getattr(record, "library", record.name.partition(".")[0]))


def _place(record: logging.LogRecord) -> str:
    return str(getattr(record, "place", f"{record.name} at {record.pathname}:{record.lineno}"))


def _library_text(record: logging.LogRecord) -> str:
    word = "warning" if record.levelno < logging.ERROR else "error"
    return f"{word} of {_library(record)}: {' '.join(record.getMessage().split())}"


def _is_terminals(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
