"""The report in a real browser: nothing that stands in prompts, answers, topics or names runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bad_neurons.artifacts import digest_path, write_json, write_jsonl
from bad_neurons.formats import NEURONS, PROBE_METRICS, RESULTS, SAE_METRICS
from bad_neurons.report import html
from bad_neurons.report.html import write_report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

RAN = "document.documentElement.setAttribute('data-ran', 'yes'); document.title = 'taken over'"
HOSTILE = [
    f"<script>{RAN}</script>", f"</script><script>{RAN}</script>", f"<img src=x onerror=\"{RAN}\">", f"<svg onload=\"{RAN}\">",
    f"\"><script>{RAN}</script>", f"' onmouseover='{RAN}", f"</title><script>{RAN}</script>", f"<!--<script>{RAN}</script>-->",
    f"</pre></code><script>{RAN}</script>", f"<iframe srcdoc=\"<script>parent.{RAN}</script>\"></iframe>", f"javascript:{RAN}",
    f"{{{{ '<script>' }}}}{RAN}", f"{{% raw %}}<script>{RAN}</script>", f"</style><script>{RAN}</script>", f"\x00<script>{RAN}</script>",
    f"&lt;script&gt;{RAN}&lt;/script&gt;", "$\\frac{<script>}$", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]  # fmt: skip


def hostile_run(folder: Path) -> Path:
    """A run whose every text is one that wants to run."""
    estimate = {"mean": 1.0, "ci95": [0.5, 1.5]}
    side = {
        "n": 3,
        "topics": 3,
        "valid": 1.0,
        "opinion_shift": estimate,
        "match_rate": estimate,
        "by_person": {"right": {"n": 1, **estimate}},
    }
    write_jsonl(folder / "evaluation" / "answers.jsonl", [{"prompt": text, "before": text, "after": text} for text in HOSTILE])
    first = HOSTILE[0]
    results = {
        "format": RESULTS, "name": first, "model": HOSTILE[1], "created": HOSTILE[4], "versions": {first: first, "bad-neurons": first},
        "machine": {"processor": first, "system": HOSTILE[2]}, "neurons": {"axis": first, "count": 3, "share": 0.1, "layers": {"1": 3}},
        "suites": {text: {"before": side, "after": side} for text in HOSTILE if text.isprintable() and text.isascii()},
        "seconds": dict.fromkeys(HOSTILE, 1.0),
        "side_effects": {"kl_per_token": 0.1}, "files": {"answers.jsonl": digest_path(folder / "evaluation" / "answers.jsonl")},
    }  # fmt: skip
    write_json(folder / "results.json", results)
    rule = {"name": HOSTILE[3], "amount": 0.2, "way": HOSTILE[0]}
    chosen = {"axis": "residual", "counts": {"1": 3}, "size": 16, "candidates": [1, 3], "rule": rule, "model": {"id": first}}
    write_json(folder / "selection" / "neurons.json", {"format": NEURONS, **chosen})
    write_json(
        folder / "sae" / "metrics.json",
        {"format": SAE_METRICS, "layers": {first: {"variance_explained": 1.0, "l0": 2.0, "dead_features": 0.0}}},
    )
    write_json(
        folder / "probe" / "metrics.json", {"format": PROBE_METRICS, "layers": [1], "fit": {"accuracy": 1.0, "auroc": 1.0, "examples": 2}}
    )
    texts = "\n".join(f"# {text}" for text in HOSTILE if "\x00" not in text)
    (folder / "config.yaml").write_text(f'tune:\n  model: {{a: "{HOSTILE[0]}"}}\n{texts}\n', encoding="utf-8")
    return folder


def opened(page: Path, tmp_path: Path) -> str:
    """The page as it is after its scripts, if it has any, ran."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=2000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def ran(dom: str) -> bool:
    return "data-ran=" in dom or "<title>taken over" in dom


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # names as long as these leave no room for a plot
def test_nothing_runs_in_a_browser(tmp_path, monkeypatch):
    run = hostile_run(tmp_path / "run")
    dom = opened(write_report(run), tmp_path)
    assert not ran(dom)
    assert dom.count("data-ran") > 50  # the texts are there, as texts
    assert "<h1>&lt;script&gt;" in dom

    # The check finds a script where texts are not escaped.
    really = html.Environment
    monkeypatch.setattr(html, "Environment", lambda **options: really(**{**options, "autoescape": False}))
    assert ran(opened(write_report(run), tmp_path))
