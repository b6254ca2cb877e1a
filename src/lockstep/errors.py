"""The exceptions a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's: shown as one line, without a traceback, and the exit code is 2.

    The text names the value that was given, what is allowed, and the key or variable to change.
    """

    exit_code = 2

    def __str__(self) -> str:
        # DataLoader re-raises a worker's exception with the worker's whole traceback as its text; the line is its last.
        return super().__str__().rpartition("UserError: ")[2].strip()


class Busy(UserError):
    """The run directory is another process's, so nothing may be written there."""


class CheckFailed(UserError):
    """A check that the user asked for found something wrong: one line as well, and the exit code is 1."""

    exit_code = 1

    def __str__(self) -> str:
        return Exception.__str__(self)
