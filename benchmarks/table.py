"""What was asked for beside what was measured: the latest results of a machine as a Markdown table.

    python benchmarks/table.py                        # the newest file below benchmarks/results
    python benchmarks/table.py benchmarks/results/2026-11-24-amd-epyc-2-cores.json

Writes the table beside the file it read, and shows it. A line whose benchmark has not run says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
MASKED = "masked matrices + second model"
Results = Mapping[str, Any]


class Claim(NamedTuple):
    """One line of the table.

    Attributes:
        work: what is done.
        against: who does it beside us.
        asked: the bound, as text.
        benchmark: which benchmark measures it.
        measured: the number, from that benchmark's results.
        holds: whether the number meets the bound.
    """

    work: str
    against: str
    asked: str
    benchmark: str
    measured: Callable[[Results], float]
    holds: Callable[[float], bool]


def ratio(theirs: str, ours: str, what: str = "seconds") -> Callable[[Results], float]:
    """Theirs over ours, of one figure of two rows."""
    return lambda results: float(results["rows"][theirs][what]) / float(results["rows"][ours][what])


def smallest(prefix: str, ours: str) -> Callable[[Results], float]:
    """The same against the fastest of the rows whose names begin with ``prefix``."""
    return lambda results: (
        min(r["seconds"] for name, r in results["rows"].items() if name.startswith(prefix)) / results["rows"][ours]["seconds"]
    )


def at_least(bound: float) -> Callable[[float], bool]:
    """A lower bound."""
    return lambda value: value >= bound


def at_most(bound: float) -> Callable[[float], bool]:
    """An upper bound."""
    return lambda value: value <= bound


def tuning(layers: str, theirs: str, ours: str, what: str = "seconds", form: str = "written") -> Callable[[Results], float]:
    """Two rows of the tuning benchmark."""
    return ratio(f"layers {layers}, {form}: {theirs}", f"layers {layers}, {form}: {ours}", what)


CACHED, FIRST, LORA = "bad-neurons, cached", "bad-neurons, first epoch", "peft LoRA"
CLAIMS = (
    Claim("tuning, layers 6-17, clean pass cached", MASKED, "at least 5x", "tuning", tuning("6-17", MASKED, CACHED), at_least(5)),
    Claim("the same", "peft LoRA + disable_adapter", "at least 5x", "tuning", tuning("6-17", LORA, CACHED), at_least(5)),
    Claim("the same, first epoch", MASKED, "at least 3.5x", "tuning", tuning("6-17", MASKED, FIRST), at_least(3.5)),
    Claim("tuning, layers 12-17, clean pass cached", MASKED, "at least 12x", "tuning", tuning("12-17", MASKED, CACHED), at_least(12)),
    Claim("the same", "peft LoRA + disable_adapter", "at least 11x", "tuning", tuning("12-17", LORA, CACHED), at_least(11)),
    Claim(
        "tuning, memory above the weights", MASKED, "at least 5x less", "tuning", tuning("6-17", MASKED, CACHED, "peak_bytes"), at_least(5)
    ),
    Claim(
        "checkpoint, optimizer included",
        "Lightning's default",
        "at least 20x smaller",
        "tuning",
        lambda results: float(results["checkpoint"][f"{MASKED} / bad-neurons"]),
        at_least(20),
    ),
    Claim(
        "extraction, 9 layers, width 4,096",
        "TransformerLens run_with_cache + sae-lens",
        "at least 4x",
        "extraction",
        ratio("HookedTransformer, everything", "bad-neurons"),
        at_least(4),
    ),
    Claim(
        "the same, seconds",
        "bare truncated forward + SAE products",
        "at most 1.25x",
        "extraction",
        lambda results: 1 / ratio("bare", "bad-neurons")(results),
        at_most(1.25),
    ),
    Claim(
        "greedy layer selection, 18 layers, 600 examples",
        "scikit-learn, refit a candidate",
        "at least 50x",
        "layer_selection",
        smallest("scikit-learn", "Gram matrices"),
        at_least(50),
    ),
    Claim(
        "NLP + POLI + PHIL by letter",
        "lm-evaluation-harness",
        "at least 2x",
        "evaluation",
        ratio("lm-evaluation-harness", "bad-neurons"),
        at_least(2),
    ),
    Claim(
        "chunked head, memory, 2,048 tokens",
        "dense logits",
        "at least 10x less",
        "head",
        ratio("dense, 2048", "chunked, 2048", "peak_bytes"),
        at_least(10),
    ),
    Claim(
        "the same, seconds",
        "dense logits",
        "at most 1.15x",
        "head",
        lambda results: 1 / ratio("dense, 2048", "chunked, 2048")(results),
        at_most(1.15),
    ),
    Claim(
        "bad-neurons --help, seconds", "", "at most 2", "startup", lambda results: float(results["rows"]["--help"]["seconds"]), at_most(2)
    ),
    Claim(
        "a run in which nothing changed, seconds",
        "",
        "at most 3",
        "startup",
        lambda results: float(results["rows"]["run, nothing changed"]["seconds"]),
        at_most(3),
    ),
)


def table(content: Results) -> str:
    """The Markdown table of a results file."""
    machine, found = content["machine"], content["benchmarks"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}; {versions}.",
        "",
        "| work | against | asked for | measured | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in CLAIMS:
        if claim.benchmark not in found:
            lines.append(f"| {claim.work} | {claim.against} | {claim.asked} | not run: `python benchmarks/{claim.benchmark}.py` | |")
            continue
        value = claim.measured(found[claim.benchmark])
        verdict = "yes" if claim.holds(value) else "**no**"
        lines.append(f"| {claim.work} | {claim.against} | {claim.asked} | {value:.3g} | {verdict} |")
    return "\n".join(lines) + "\n\n" + rows_text(found)


def rows_text(found: Results) -> str:
    """All contenders of the benchmarks that have them: median seconds, rate and memory."""
    lines = ["| benchmark | contender | seconds | units a second | MiB above the base |", "| --- | --- | --- | --- | --- |"]
    for benchmark, results in found.items():
        if isinstance(results.get("rows"), dict):
            for name, row in results["rows"].items():
                rate = f"{row['rate']:,.0f}" if "rate" in row else ""
                memory = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else ""
                lines.append(f"| {benchmark} | {name} | {row['seconds']:.4g} | {rate} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write and show the table."""
    files = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(RESULTS.glob("*.json"))
    if not files:
        sys.exit(f"no results below {RESULTS}: run a benchmark first")
    text = table(json.loads(files[-1].read_text(encoding="utf-8")))
    files[-1].with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
