"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake of the user's: shown as one line, without a traceback, and the exit code is 2.

    The text names the value that was given, what is allowed, and the key or variable to change.
    """

    def __str__(self) -> str:
        # DataLoader re-raises a worker's exception with the worker's whole traceback as its text; the line is its last.
        return super().__str__().rpartition("UserError: ")[2].strip()
