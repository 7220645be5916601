"""The two ways in which a command ends early, and the exit code of each."""

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_NUMERICAL_ERROR = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143


class UserError(ValueError):
    """The user's input is refused (exit code 2).

    The message is one line: the key or file, its value, and what to change.
    """


class NumericalError(ArithmeticError):
    """Training stopped because a number is NaN or infinite (exit code 3).

    The message names the step and the batch.
    """


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that an exception ends."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR
    if isinstance(error, NumericalError):
        return EXIT_NUMERICAL_ERROR
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_TERMINATED if isinstance(error, SystemExit) else EXIT_BUG
