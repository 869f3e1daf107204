"""Commands that fail on one of several processes."""

from __future__ import annotations

import contextlib
import io

from bad_neurons import cli, ranks, stages
from bad_neurons.errors import UserError


def failing(number: int | None) -> tuple[int, str]:
    """A command that fails on process `number` (None: on all) while the others wait for it; status and standard error."""

    def command(_arguments: list[str]) -> None:
        rank = ranks.join(0)
        if number in (rank.number, None):
            raise UserError("records.jsonl: cannot be read")
        rank.wait()

    stages.evaluate_command = command
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(["evaluate"])
    return status, said.getvalue()
