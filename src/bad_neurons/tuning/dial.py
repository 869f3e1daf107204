"""How many times a change counts: the one switch behind ``disabled`` and ``scaled`` of every edit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Dial:
    """A factor that contexts multiply and put back.

    Attributes:
        factor: 1 where the change counts as it is, 0 where the model is to be the clean one.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """The factor times ``factor`` inside the block; so within a block that switches off, everything is off."""
        before, self.factor = self.factor, self.factor * factor
        try:
            yield
        finally:
            self.factor = before
