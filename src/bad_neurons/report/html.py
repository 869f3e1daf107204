"""``report.html``: one self-contained page made from the files of a run folder."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, Undefined

from bad_neurons.artifacts import digest_path, read_json, written_aside
from bad_neurons.data.records import read_jsonl_rows
from bad_neurons.errors import UserError
from bad_neurons.formats import LAYERS, NEURONS, PROBE_METRICS, PROBES, RESULTS, SAE_METRICS
from bad_neurons.report import plots, terminal
from bad_neurons.report.probes import page_of_probes, plot_probes
from bad_neurons.sealed import Format
from bad_neurons.secrets import hide

_AXES = {
    "residual": "residual (index i owns column i of gate_proj and up_proj and row i of down_proj)",
    "intermediate": "intermediate (index j owns row j of gate_proj and up_proj and column j of down_proj)",
    "heads": "heads (query head h owns its rows of q_proj and its columns of o_proj)",
}
_RULES = {
    "top_p": "smallest set of neurons that holds {percent:.0f} % of the summed scores",
    "top_fraction": "best {percent:.1f} % of the neurons by score",
    "top_k_per_layer": "best {amount:.0f} neurons of each layer by score",
    "same_counts": "best neurons of each layer by score, as many as another choice has there",
    "all": "every neuron of the candidate layers",
}
_WAYS = {
    "probe": "the probe's weights",
    "random": "random numbers of seed {seed}",
    "gradient": "the gradient of the behaviour ({objective})",
    "contrast": "the difference of activations between agreeing and disagreeing answers",
    "fisher": "effect ({objective}) for side effect, weight by weight",
    "fisher_step": "effect ({objective}) for side effect, along each neuron's gradient",
    "kfac": "effect ({objective}) for side effect, row by row and column by column",
    "heads": "the share of the pull to the person that goes through each attention head",
}
_MACHINE = {"processor": "", "cores": " cores", "device": "", "system": ""}

_OF_THE_BOUND = ("kl_bound/kl", "kl_bound/kept_step")  # columns of metrics.csv, see callbacks/kl_bound.py


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder from whatever files the run has, its plots as PNG below ``plots/``, and give its path.

    A section whose file is absent says which command makes it.

    Args:
        run: a run folder that holds at least ``results.json``.

    Raises:
        UserError: ``results.json`` is absent, or a file is damaged.
    """
    run = Path(run)
    if not (run / "results.json").is_file():
        raise UserError(f"{run / 'results.json'}: absent; a report needs it, and `bad-neurons run` or `bad-neurons evaluate` writes it")
    results = _object(run / "results.json", RESULTS) or {}
    # autoescape: prompts, answers and names come from models and data files
    environment = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": _filter(terminal.number_text),
        "percent": _filter(terminal.percent_text),
        "mean": _filter(terminal.mean_text),
        "interval": _filter(terminal.interval_text),
    }
    template = environment.from_string(files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    with written_aside(run / "report.html") as aside:
        aside.write_text(template.render(_context(run, results)), encoding="utf-8")
    return run / "report.html"


def headline(results: Mapping[str, Any]) -> str:
    """The main numbers of a run in one sentence: the shift on the first suite, the neurons, and the KL.

    Args:
        results: the content of ``results.json``.
    """
    suites, neurons, effects = results.get("suites") or {}, results.get("neurons") or {}, results.get("side_effects") or {}
    name = next(iter(suites), "")
    before, after = ((suites.get(name, {}).get(side) or {}).get("opinion_shift") for side in ("before", "after"))
    if not before:
        return "This run has no opinion shift."
    sentence = f"On the suite {name}, the mean opinion shift "
    if not after:
        sentence += f"is {terminal.estimate_text(before)} nats"
    else:
        sentence += f"went from {terminal.estimate_text(before)} to {terminal.estimate_text(after)} nats"
        if neurons:
            sentence += f" after {_neurons_text(neurons)} were retrained"
        if "kl_per_token" in effects:
            sentence += f", at a KL of {terminal.small_text(effects['kl_per_token'])} nats per token on unrelated text"
    return _typeset(sentence) + "."


def _neurons_text(neurons: Mapping[str, Any]) -> str:
    share = f" ({terminal.percent_text(neurons['share'])} of those in the candidate layers)" if "share" in neurons else ""
    return f"{neurons.get('count', 0):,} neurons{share}"


def _context(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    suites = results.get("suites") or {}
    shown = {name: (sides, list(terminal.suite_rows(sides))) for name, sides in suites.items()}
    used = {measure for _, rows in shown.values() for measure, *_ in rows}
    shifts = {name: sides for name, sides in suites.items() if _has_shift(sides)}
    config = hide((run / "config.yaml").read_text(encoding="utf-8", errors="replace")) if (run / "config.yaml").is_file() else None
    selection = _object(run / "selection" / "neurons.json", NEURONS)
    decoded = ((selection or {}).get("rule") or {}).get("way", "probe") == "probe"  # else a plot of weights is of an earlier choice
    curves, probes = _curves(run / "tuning" / "metrics.csv"), _probes(run)
    sae = (_object(run / "sae" / "metrics.json", SAE_METRICS) or {}).get("layers")
    choice, compared = _object(run / "layers" / "layers.json", LAYERS), _object(run / "probes" / "probes.json", PROBES)
    figures = {
        "shift": plots.plot_shift(shifts) if shifts else None,
        "choice": plots.plot_layer_choice(choice) if choice else None,
        "compared": plot_probes(compared) if compared else None,
        "layers": plots.plot_layers(_counts(selection), int(selection["size"])) if selection else None,
        "training": plots.plot_training(curves) if curves else None,
    }
    for name, figure in figures.items():
        if figure is not None:
            plots.save_png(figure, run / "plots" / f"{name}.png")
    return {
        "results": results,
        "headline": headline(results),
        "measures": [measure for measure in terminal.MEASURES if measure in used],
        "suites": shown,
        "tuned": any(sides.get("after") for sides in suites.values()),
        "people": _people(suites),
        "side_effects": [[_typeset(text) for text in row] for row in terminal.side_effect_rows(results.get("side_effects") or {})],
        "facts": _facts(results, selection, config),
        "sae": sae,
        "choice": choice,
        "scores": plots.SCORES,
        "probes": probes,
        "compared": page_of_probes(compared) if compared else None,
        "weights_plot": _png(run / "selection" / "weights.png") if decoded else None,
        "decoded": decoded,
        "probed": bool(decoded or sae or probes or compared),  # a run may do without
        **{f"{name}_plot": plots.data_uri(figure) if figure is not None else None for name, figure in figures.items()},
        "stopped": _stopped(curves),
        "answers": _answers(run / "evaluation" / "answers.jsonl", (results.get("files") or {}).get("answers.jsonl")),
        "seconds": results.get("seconds") or {},
        "config": config,
    }


def _has_shift(sides: Mapping[str, Any]) -> bool:
    return any((side or {}).get("opinion_shift") for side in sides.values())


def _people(suites: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a suite and kind of person, in the order right, wrong, opinion."""
    titles = {"right": "is right", "wrong": "is wrong", "opinion": "has an opinion"}
    rows = []
    for suite, sides in suites.items():
        before, after = ((sides.get(side) or {}).get("by_person") or {} for side in ("before", "after"))
        kinds = [kind for kind in titles if kind in before or kind in after]
        sides_of = {kind: {"before": before.get(kind) or {}, "after": after.get(kind) or {}} for kind in kinds}
        rows += [{"suite": suite, "person": titles[kind], **sides_of[kind]} for kind in kinds]
    return rows


def _facts(results: Mapping[str, Any], selection: Mapping[str, Any] | None, config: str | None) -> list[tuple[str, str]]:
    """What was done, as rows of name and value; what a run does not say is left out."""
    neurons, machine, chosen = results.get("neurons") or {}, results.get("machine") or {}, selection or {}
    by_layer = chosen.get("counts") or neurons.get("layers") or {}
    rows = {
        "Run": results.get("name"),
        "Date": str(results.get("created") or "").replace("T", " "),
        "Model": results.get("model"),
        "Candidate layers": ", ".join(map(str, chosen.get("candidates") or [])),
        "Neuron axis": _AXES.get(str(neurons.get("axis") or chosen.get("axis")), ""),
        "Rule": _rule(chosen.get("rule") or {}),
        "Retrained": _neurons_text(neurons) if neurons else "",
        "Neurons by layer": ", ".join(f"{layer}: {count}" for layer, count in sorted(by_layer.items(), key=lambda item: int(item[0]))),
        "Tuning": _tuning_settings(config),
        "Unrelated text": f"{tokens:,} tokens" if (tokens := (results.get("side_effects") or {}).get("tokens")) else "",
        "Machine": ", ".join(f"{machine[key]}{unit}" for key, unit in _MACHINE.items() if machine.get(key)),
        "Versions": ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()),
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def _rule(rule: Mapping[str, Any]) -> str:
    name = str(rule.get("name") or "")
    if name not in _RULES or "amount" not in rule:
        return name
    amount, way = float(rule["amount"]), str(rule.get("way") or "")
    said = f"{name}: " + _RULES[name].format(amount=amount, percent=100 * amount)
    return f"{said}; scored by {_WAYS[way].format(seed=rule.get('seed'), objective=rule.get('objective'))}" if way in _WAYS else said


def _tuning_settings(config: str | None) -> str:
    """The scalar settings of the tuning stage; empty where the configuration does not name that stage."""
    try:
        stages = yaml.safe_load(config or "")
    except yaml.YAMLError:
        return ""
    stage = (stages.get("tune") or stages.get("tuning")) if isinstance(stages, dict) else None
    return ", ".join(f"{name} {value}" for name, value in _leaves(stage, "")) if isinstance(stage, dict) else ""


def _leaves(values: Mapping[Any, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return [(name, value) for name, value in leaves if isinstance(value, (str, int, float))]


def _probes(run: Path) -> list[dict[str, Any]]:
    """One row a probe and side of the split."""
    rows = []
    for title, folder in (("SAE features", "probe"), ("Residual (control)", "probe-residual")):
        metrics = _object(run / folder / "metrics.json", PROBE_METRICS) or {}
        rows += [{"probe": title, "side": side, **metrics[side]} for side in ("fit", "validation", "test") if side in metrics]
    return rows


def _counts(selection: Mapping[str, Any]) -> dict[int, int]:
    chosen = {int(layer): int(count) for layer, count in selection["counts"].items()}
    return {int(layer): 0 for layer in selection.get("candidates") or []} | chosen


def _curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Points (step, value) by column of a log of metrics, whose rows have empty cells."""
    curves: dict[str, list[tuple[float, float]]] = {}
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as handle:
            for number, row in enumerate(csv.DictReader(handle), start=2):
                for name in (*(f"{side}/{term}" for side in ("train", "val") for term in plots.TERMS), *_OF_THE_BOUND):
                    if row.get(name):
                        curves.setdefault(name, []).append((_cell(path, number, row, "step"), _cell(path, number, row, name)))
    return curves


def _stopped(curves: Mapping[str, list[tuple[float, float]]]) -> dict[str, float] | None:
    """Where the tuning passed a bound on KL (callback KLBound): step and KL, there and of the state that was kept; else None."""
    if "kl_bound/kept_step" not in curves:
        return None
    (last, kept), measured = curves["kl_bound/kept_step"][-1], dict(curves["kl_bound/kl"])
    return {"step": last + 1, "kl": measured[last], "kept_step": kept, "kept_kl": measured.get(kept - 1, 0.0)}


def _cell(path: Path, line: int, row: Mapping[str, str], name: str) -> float:
    try:
        return float(row.get(name) or "")
    except ValueError as error:
        raise UserError(f"{path}: line {line}: {name} {row.get(name)!r} is not a number; run `bad-neurons tune fit` again") from error


def _answers(path: Path, digest: str | None) -> list[dict[str, Any]]:
    """Rows of ``answers.jsonl``; ``digest`` is what the results say of the file."""
    if not path.is_file():
        return []
    if digest is not None and digest_path(path) != digest:
        raise UserError(f"{path}: damaged or of another evaluation than the results; run `bad-neurons evaluate` again")
    return [row for _, row in read_jsonl_rows(path) if isinstance(row, dict)]


def _object(path: Path, form: Format) -> dict[str, Any] | None:
    """A JSON object of a format, or None where there is no such file."""
    found: dict[str, Any] | None = read_json(path, form) if path.is_file() else None
    return found


def _png(path: Path) -> str | None:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _filter(text_of: Any) -> Any:
    """A template filter that takes an absent value for None and sets minus signs."""
    return lambda value, *args: _typeset(text_of(None if isinstance(value, Undefined) else value, *args))


def _typeset(text: str) -> str:
    """Minus signs in front of numbers, a dash for an absent one, and no line break before a per-cent sign."""
    if text == terminal.ABSENT:
        return "\N{EN DASH}"
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text).replace(" %", "\N{NO-BREAK SPACE}%")
