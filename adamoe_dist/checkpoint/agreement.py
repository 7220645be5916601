"""Steps that succeed on every rank or fail on every rank."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from adamoe_dist.errors import UserError


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read because another rank failed; the message names the rank."""


@contextlib.contextmanager
def agreed(doing: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a step on all ranks and leave it together.

    The rank whose step failed raises its own exception. The others raise as well, so that nobody waits for it.

    Args:
        doing: what the step does, for the message.
        group: of all ranks, for the exchange; None: the default one.

    Raises:
        UserError: on all ranks, where it was the user's input that some rank refused.
        CheckpointError: on the ranks that succeeded, where another failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    reports = gathered(None if problem is None else (isinstance(problem, UserError), describe(problem)), group)
    if problem is not None:
        raise problem
    for rank, report in enumerate(reports):
        if report is not None:
            is_user_error, message = report
            raise UserError(message) if is_user_error else CheckpointError(f"rank {rank} failed {doing}: {message}")


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's ``value``, by rank; ``group`` is of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def describe(problem: BaseException) -> str:
    """Return an exception as one line; the class is left out where the message is the user's."""
    message = " ".join(str(problem).split())
    return message if isinstance(problem, UserError) else f"{type(problem).__name__}: {message}"
