"""Write the table of bad inputs into ``docs/reliability.md``: ``PYTHONPATH=tests python tests/bad_inputs/table.py``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # no hub and no GPU: read when libraries are imported

from bad_inputs.answers import answer, page, row
from bad_inputs.cases import Ground, every_case

_HEAD = ["| input | what is wrong | answer | status |", "| --- | --- | --- | --- |"]


def write() -> int:
    """Run every case and write the table; gives the number of cases that were not answered in one line with status 2."""
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for case in every_case(ground):
            given = answer(ground, case)
            rows.append(row(case, given))
            if given.status != 2 or "Traceback" in given.line or given.left:
                wrong += 1
                sys.stderr.write(f"{case.what}, {case.wrong}: status {given.status}, left {given.left}\n{given.line[-1500:]}\n")
    before, _, rest = page().read_text(encoding="utf-8").partition("<!-- bad inputs -->")
    after = rest.partition("<!-- end -->")[2]
    table = "\n".join([f"{len(rows)} inputs.", "", *_HEAD, *rows])
    page().write_text(f"{before}<!-- bad inputs -->\n{table}\n<!-- end -->{after}", encoding="utf-8")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, write()))
