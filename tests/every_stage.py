"""Runs every stage on a tiny model, in the current folder: the work of one of the processes of test_determinism."""

from __future__ import annotations

import csv
import sys
import warnings
from pathlib import Path

import yaml

from bad_neurons.cli import main
from helpers import tiny_run_config

WAYS = ("random", "gradient", "contrast", "fisher", "fisher_step", "kfac", "heads")
METHODS = {
    "random": {"select": {"way": "random"}},
    "LoRA": {"correction": "lora", "lora": {"rank": 1}},
    "full": {"correction": "full"},
    "steering": {"correction": "steering"},
}
QUESTIONS = [{"statement1": f"tea {i} is best", "statement2": f"coffee {i} is best"} for i in range(2)]


def run(*arguments: str) -> None:
    """One command, which is to end well."""
    assert main(list(arguments)) == 0, arguments


def every_stage() -> None:
    """All of a run, all ways of choosing, a comparison, and a judge."""
    changes = {"layers": {"greedy": {"candidates": [0, 1, 2, 3], "budget": 2}}, "probes": {}, "seed": 3}
    path = tiny_run_config(Path("tiny"), **changes)
    shared = ["--model", "tiny/model", "--layers", "[1,3]", "--records", "tiny/records.jsonl", "--max_texts", "8"]
    run("run", "--config", str(path))
    for way in WAYS:
        axis = "heads" if way == "heads" else "intermediate"
        rule = ["--rule", "top_fraction", "--amount", "0.3", "--axis", axis]
        run("select", "--way", way, *shared, *rule, "--out", f"chosen/{way}")
    run("select", "--way", "random", *shared, "--rule", "top_fraction", "--amount", "0.3", "--seed", "1", "--out", "chosen/another-seed")

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    tune = {**config["tune"], "model": {"optimizer": "whitened", "shift_weight": 0.5}}
    own = {
        "seeds": [0],
        "examples": [0],
        "strengths": [1.0],
        "kl_levels": [1e-4],
        "kl_bound": 1e-4,
        "max_paragraphs": 2,
        "reference": "random",
    }
    select = {"axis": "intermediate", "rule": "top_fraction", "amount": 0.1}
    compared = {**config, "layers": [1, 3], "out": "compared", "tune": tune, "select": select, "methods": METHODS, "compare": own}
    Path("compare.yaml").write_text(yaml.safe_dump({k: v for k, v in compared.items() if k not in ("probes", "seed")}), encoding="utf-8")
    run("compare", "--config", "compare.yaml", "--processes", "1")

    Path("questions").mkdir()
    with open("questions/questions_pickside.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(QUESTIONS[0]))
        writer.writeheader()
        writer.writerows(QUESTIONS)
    judge = ["--tests", '["pickside"]', "--questions", "questions", "--judges", '["local:tiny/model"]', "--max_new_tokens", "5"]
    run("judge", "--model", "tiny/model", "--delta", "tiny/run/tuning/delta.safetensors", "--out", "judged", *judge)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    every_stage()
    sys.stdout.write(f"{hash('a')}\n")
