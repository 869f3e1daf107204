"""The exceptions that a person sees: one line each, no traceback."""

from __future__ import annotations

from bad_neurons.secrets import hide

_LONGEST = 1000  # characters of a message


class UserError(Exception):
    """Something a person typed or supplied is wrong; the command line prints it on one line and exits with status 2.

    The message names the file, the line or the option, and says what would be right. Parts of it may come from data: it is kept
    to one line of printable characters, of a length that can be read, and without tokens and keys.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(hide(message).split())
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}")


class RunError(UserError):
    """A run had to be stopped: its numbers went wrong, or what must not change did. The message says what was kept, and what to do."""
