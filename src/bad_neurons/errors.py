"""The exceptions that a person sees: one line each, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something a person typed or supplied is wrong; the command line prints it on one line and exits with status 2.

    The message names the file, the line or the option, and says what would be right.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RunError(UserError):
    """A run had to be stopped: its numbers went wrong, or what must not change did. The message says what was kept, and what to do."""
