"""metrics.csv and TensorBoard, written at once and continued after an interruption."""

from __future__ import annotations

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2l.report.run_directory import MetricsLog, read_metrics


def filled(folder, steps: int) -> None:
    log = MetricsLog(folder, ("loss", "dev_loss"))
    for step in range(steps):
        log.log(step, loss=step / 2, **({"dev_loss": 1.0} if step % 2 else {}))
    log.close()


def test_a_column_that_a_row_does_not_have_stays_empty(tmp_path):
    filled(tmp_path, 2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss,dev_loss", "0,0.0,", "1,0.5,1.0"]


def test_a_column_that_does_not_exist_is_refused(tmp_path):
    log = MetricsLog(tmp_path, ("loss",))
    with pytest.raises(ValueError, match="lsos"):
        log.log(0, lsos=1.0)
    log.close()


def test_each_row_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, ("loss",))
    log.log(0, loss=1.0)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": "0", "loss": "1.0"}]
    log.close()


def test_a_continued_log_keeps_the_rows_up_to_the_checkpoint(tmp_path, monkeypatch):
    filled(tmp_path, 6)
    later = time.time() + 1  # TensorBoard reads files in the order of their seconds, and within one of their names: 10 before 9
    monkeypatch.setattr(time, "time", lambda: later)
    log = MetricsLog(tmp_path, ("loss", "dev_loss"), after=3)
    log.log(4, loss=40.0)
    log.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("0", "0.0"),
        ("1", "0.5"),
        ("2", "1.0"),
        ("3", "1.5"),
        ("4", "40.0"),
    ]
    shown = [(event.step, event.value) for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]
    assert shown == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 40.0)]


def test_a_new_log_begins_anew(tmp_path):
    filled(tmp_path, 3)
    MetricsLog(tmp_path, ("loss", "dev_loss")).close()
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_continuing_where_nothing_is_begins_anew(tmp_path):
    MetricsLog(tmp_path, ("loss",), after=5).close()
    assert read_metrics(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize("cut", ["2", "2,1.", "2,1.0", "x"])
def test_a_last_line_cut_short_is_left_out(cut, tmp_path):
    filled(tmp_path, 2)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(cut)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ["0", "1"]
