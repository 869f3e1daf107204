"""The metrics of a fit as one CSV file, whole each time."""

from __future__ import annotations

import csv

from bad_neurons.metrics_log import MetricsLog


def rows(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def test_rows_with_their_columns(tmp_path):
    log = MetricsLog(str(tmp_path / "new" / "metrics.csv"))
    log.log_metrics({"epoch": 0, "train/ce": 1.5}, step=0)
    log.log_metrics({"epoch": 0, "val/kl": 0.25}, step=0)
    assert not log.path.exists()
    log.finalize("success")
    assert log.path.read_text() == "epoch,step,train/ce,val/kl\n0,0,1.5,\n0,0,,0.25\n"


def test_the_file_is_there_for_whoever_watches(tmp_path):
    log = MetricsLog(str(tmp_path / "metrics.csv"))
    for step in range(250):
        log.log_metrics({"a": step}, step)
        log.save()
        assert len(rows(log.path)) == (step + 1) // 100 * 100 if step >= 99 else not log.path.exists()
    log.after_save_checkpoint(None)
    assert len(rows(log.path)) == 250


def test_going_on_continues_to_the_bit(tmp_path):
    values = [0.1 + 0.2, 1e-17, 3.0, float("nan"), 123456789.123456789]
    whole, cut = (MetricsLog(str(tmp_path / name)) for name in ("whole.csv", "cut.csv"))
    for step, value in enumerate(values):
        whole.log_metrics({"a": value} if step else {"b": value}, step)
    for step, value in enumerate(values[:2]):
        cut.log_metrics({"a": value} if step else {"b": value}, step)
    resumed = MetricsLog(str(tmp_path / "cut.csv"))
    resumed.restore(cut.text({"a": str(values[2]), "step": "2"}))
    for step in (3, 4):
        resumed.log_metrics({"a": values[step]}, step)
    assert resumed.text() == whole.text()


def test_a_log_without_a_row_leaves_an_old_file_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("old")
    MetricsLog(str(tmp_path / "metrics.csv")).finalize("failed")
    assert (tmp_path / "metrics.csv").read_text() == "old"
