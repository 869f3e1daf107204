"""What the command line answers to each case, and the table of it in ``docs/reliability.md``.

``PYTHONPATH=tests python tests/bad_inputs/table.py`` writes the table anew.
"""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from bad_inputs.cases import Case, Ground
from bad_neurons.cli import main

_LONGEST = 220  # characters of an answer in the table
_CODE = "import sys; from bad_neurons.cli import main; sys.exit(main())"


class Answer(NamedTuple):
    """What came back.

    Attributes:
        line: the last line on standard error, or all of it where there is a traceback.
        status: the exit status.
        left: files in the output folder afterwards, beside those that the case may keep.
    """

    line: str
    status: int
    left: list[str]


def answer(ground: Ground, case: Case) -> Answer:
    """Run one case, in an empty output folder."""
    shutil.rmtree(ground.out, ignore_errors=True)
    if case.process:
        done = subprocess.run([sys.executable, "-c", _CODE, *case.arguments], capture_output=True, text=True, timeout=120, check=False)
        said, status = done.stderr, done.returncode
    else:
        err = io.StringIO()
        with redirect_stderr(err), redirect_stdout(io.StringIO()):
            try:
                status = main(case.arguments)
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
        said = err.getvalue()
    line = said if "Traceback" in said else (said.strip().splitlines() or [""])[-1]
    found = {path.relative_to(ground.out).as_posix() for path in ground.out.rglob("*")} if ground.out.exists() else set()
    return Answer(line.replace(str(ground.root), "…"), status, sorted(found - set(case.keeps)))


def row(case: Case, given: Answer) -> str:
    """A row of the table."""
    line = given.line.removeprefix("bad-neurons: ")
    line = re.sub(r"\s+", " ", line if len(line) <= _LONGEST else f"{line[: _LONGEST - 60]} … {line[-50:]}")
    cells = [case.what, case.wrong, f"<code>{html.escape(line, quote=False)}</code>", str(given.status)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> Path:
    """The page that holds the table."""
    return Path(__file__).parents[2] / "docs" / "reliability.md"


def rows_of_the_page() -> list[str]:
    """Its rows."""
    text = page().read_text(encoding="utf-8")
    table = text.partition("<!-- bad inputs -->")[2].partition("<!-- end -->")[0]
    return [line for line in table.splitlines() if line.startswith("| ")][2:]
