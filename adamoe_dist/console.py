"""What command-line tools share: how a refusal is printed and how progress is shown."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from tqdm import tqdm

from adamoe_dist.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError

_CLEAR_LINE = "\r\x1b[K"


def fail(message: str) -> None:
    """Print ``error: message`` as one line on standard error."""
    # A bar, maybe of another process, may stand on the terminal's last line.
    start = _CLEAR_LINE if is_terminal(sys.stderr) else ""
    print(f"{start}error: " + " ".join(message.split()), file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print one line of a tool's result on standard output, with escapes for what its encoding has not."""
    encoding = sys.stdout.encoding or "utf-8"
    print(message.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a person looks at ``stream``, on a terminal that can go back to the start of a line."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def above_bars(stream: TextIO) -> Iterator[None]:
    """Take progress bars away from the terminal while lines are written to ``stream``."""
    if is_terminal(stream):
        with tqdm.external_write_mode(file=stream):
            yield
    else:
        yield


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of every option that has one worth reading."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class ToolParser(argparse.ArgumentParser):
    """Reads a tool's command line; shows defaults in its help and refuses in one line, as all else does."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} (see --help)")


def whole_number(text: str) -> int:
    """Read an option that is a whole number from 0 on; a ``type`` of argparse's."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def given_path(text: str) -> str:
    """Read an option that is a path; a ``type`` of argparse's."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path; give one")
    return text


def run_tool(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a tool's ``main(argv)`` and exit as the project promises.

    Exit code 0 when it is done, 2 with one line for a refused input, 130 when interrupted, 141 without a word when
    whoever read its output left; any other exception is a bug and keeps its traceback (exit code 1).
    """
    try:
        code = main(sys.argv[1:])
    except UserError as refusal:
        fail(str(refusal))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # What is left in the buffer would be tried again, and be complained about, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    sys.exit(code or 0)


def progress(total: float | None, unit: str, description: str) -> "tqdm[NoReturn]":
    """Return a progress bar with time left: a live bar on a terminal, a line every 10 seconds elsewhere."""
    interactive = sys.stderr.isatty()
    # A bar that appears at once would come between the command and the line that refuses its input.
    delay = 0.5 if interactive else 2.0
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        desc=description,
        file=sys.stderr,
        mininterval=0.1 if interactive else 10.0,
        dynamic_ncols=interactive,
        ascii=not interactive,
        delay=delay,
    )


def step_bar(steps: int, done: int) -> "tqdm[NoReturn] | None":
    """Return the bar of a training run, or None where its output is not read on a terminal.

    What it says of the time is set with ``set_postfix_str``: tqdm itself would count the first steps like any other.
    """
    if not (is_terminal(sys.stdout) and is_terminal(sys.stderr)):
        return None
    return tqdm(
        total=steps,
        initial=done,
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
        bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}",
    )
