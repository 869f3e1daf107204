"""Readers under atheris, which follows the branches that its bytes take.

pip install -e '.[fuzz]'
PYTHONPATH=tests python tests/fuzz/atheris_readers.py KIND [-runs=100000] [-max_total_time=60] [other options of libFuzzer]

KIND is one of the kinds in ``readers.py``. It starts from the good file of that kind, and stops at the first bytes that are
neither read nor refused in one line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["bad_neurons.reading", "bad_neurons.sealed", "bad_neurons.data", "bad_neurons.selection", "json", "yaml", "csv"]
):
    from fuzz.readers import READERS, read, write_good


def main() -> None:
    """Fuzz one reader."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: {sys.argv[0]} KIND [options of libFuzzer]; KIND is one of {', '.join(READERS)}")
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_good(Path(folder))[kind]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "good").write_bytes(path.read_bytes())

        def one(content: bytes) -> None:
            path.write_bytes(content)
            read(kind, path)

        atheris.Setup([sys.argv[0], str(corpus), "-max_len=4096", *sys.argv[1:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
