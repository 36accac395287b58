"""The exceptions that reach a user as a single line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a config, a data file or a command line.

    The message is one line that names the place (parameter or ``file:line``), the rule, the value found and the
    remedy. The command line prints it without a traceback and exits with code 2.
    """


class RankError(UserError):
    """A mistake, or trouble with the machine, that only this process has met; it says so itself."""


class Stopped(Exception):
    """The run was asked to stop, and did so with all its work saved.

    Args:
        signal_number: Of the signal that asked.
        message: One line that says where the run stands and how it goes on.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
