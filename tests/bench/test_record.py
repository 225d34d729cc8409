"""bench.record: rows go to JSON and come back; strange files are named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.harness import Summary
from bench.machine import Machine, noise
from bench.record import Record, Recorder, Row, Work, append, pooled, read_record

MACHINE = Machine(2e10, 3e10, {"float32": 1e11})
RATIO, SECONDS = Summary(1.5, 1.4, 1.6, 9), Summary(0.003, 0.002, 0.004, 9)


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        Row("plan", {"T": 4}, "int64", "sort", "moe_fast", RATIO, SECONDS, Work(0, 8.0), 1e-6, 0.5),
        Row("plan", {"T": 4}, "int64", "Liger", "moe_fast", reason="needs a CUDA GPU"),
        Row("memory", {"T": 4}, "float32", "dense", "moe_fast", sweep="T", peak_bytes=12),
    ]
    recorder = Recorder(MACHINE, size="tiny")
    recorder.add(rows)
    path = tmp_path / "run.json"
    recorder.write(path)
    record = read_record(path)
    assert record == recorder.record
    assert record.rows == rows and record.machine == MACHINE
    assert record.environment["size"] == "tiny"
    assert record.environment["commit"] and record.environment["versions"]["torch"]
    assert record.environment["threads"] >= 1 and record.environment["cpu"]
    assert record.load_after is not None


def measured(who: str, *quartiles: float, least: float | None = None) -> Row:
    q1, median, q3 = quartiles
    summary = Summary(median, q1, q3, 5)
    return Row("plan", {"T": 4}, "int64", who, "ours", summary, summary, floor_seconds=least)


def test_processes_are_pooled():
    """The median of the medians; the spread from the least quartile to the greatest."""
    rows = [measured("a", 1.0, 2.0, 3.0, least=1.0), measured("a", 1.5, 4.0, 4.5),
            measured("a", 2.0, 2.5, 9.0)]  # fmt: skip
    row = pooled(rows)
    assert row.ratio == row.seconds == Summary(2.5, 1.0, 9.0, 15)
    assert row.share_of_floor == 1.0 / 2.5


def test_who_ran_in_one_process_only_keeps_its_figures():
    failed = Row("plan", {"T": 4}, "int64", "a", "ours", reason="fails: out of memory")
    assert pooled([failed, measured("a", 1, 2, 3)]).ratio == Summary(2, 1, 3, 5)
    assert pooled([failed, failed]) == failed


def test_a_recorder_pools_what_is_the_same():
    recorder = Recorder(None)
    a, b = measured("a", 1, 2, 3), measured("b", 1, 1, 1)
    assert recorder.add([a, b]) == [a, b]
    swept = replace(a, sweep="T")  # a point of a curve is another measurement
    assert recorder.add([replace(a, ratio=Summary(4, 4, 4, 5)), swept])[1] == swept
    assert [(row.who, row.ratio.median) for row in recorder.record.rows] == [
        ("a", 3), ("b", 1), ("a", 2)
    ]  # fmt: skip


def test_a_busy_machine_is_told_by_who_measured(tmp_path):
    recorder = Recorder(None)
    for share in (0.5, 0.7):
        recorder.add([], share)
    recorder.write(tmp_path / "run.json")
    assert any("a busy thread got" in reason for reason in recorder.record.noisy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "machine": null, '
    '"environment": {}, "rows": [{"who": "x"}]}'],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "strange.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"strange\.json holds no measurements"):
        read_record(path)


def test_a_write_leaves_a_whole_file_each_time(tmp_path):
    recorder, path = Recorder(None), tmp_path / "run.json"
    for count in (1, 2):
        recorder.add([Row("plan", {}, "int64", str(count), "moe_fast")])
        recorder.write(path)
        assert len(json.loads(path.read_text())["rows"]) == count


@pytest.mark.parametrize(
    ("before", "after", "shares", "reasons"),
    [
        (0.1, 2.2, [1.0, 0.99], 0),
        (None, None, [1.0], 0),
        (3.0, 2.2, [1.0], 1),
        (0.1, 4.0, [1.0], 1),
        (0.1, 2.0, [1.0, 0.6], 1),
        (9.0, 9.0, [0.2], 3),
    ],
)
def test_noise(before, after, shares, reasons):
    assert len(noise(before, after, shares, threads=2)) == reasons


@pytest.mark.parametrize(
    ("flop", "moved", "dtype", "seconds"),
    [
        (1e11, 3e9, "float32", 1.0),  # computing takes longer
        (1e10, 3e10, "float32", 1.0),  # moving does
        (0, 3e10, "int64", 1.0),  # nothing to compute
        (1.0, 1.0, "float16", None),  # no rate is known
    ],
)
def test_the_floor_is_the_larger_of_two_times(flop, moved, dtype, seconds):
    assert MACHINE.floor_seconds(flop, moved, dtype) == seconds


def part(who: str, seconds: float, operation: str = "plan", **environment) -> Record:
    given = {"cpu": "a processor", "threads": 2, "commit": "1"} | environment
    summary = Summary(seconds, seconds, seconds, 5)
    figures = {"tokens per second": 7}
    return Record(given, rows=[
        Row(operation, {"T": 4}, "int64", who, "ours", summary, summary, figures=figures)
    ])  # fmt: skip


def test_parts_are_appended_and_cases_replaced(tmp_path):
    path = tmp_path / "run.json"
    append(path, part("ours", 1.0))
    append(path, part("ours", 2.0, "route", commit="2"))
    assert [row.operation for row in read_record(path).rows] == ["plan", "route"]
    append(path, part("ours", 3.0, commit="3"))
    record = read_record(path)
    assert [(row.operation, row.seconds.median) for row in record.rows] == [
        ("route", 2.0), ("plan", 3.0)
    ]  # fmt: skip
    assert record.rows[0].figures == {"tokens per second": 7}
    assert record.environment["commit"] == "3"
    assert record.environment["earlier_commits"] == ["1", "2"]


@pytest.mark.parametrize("other", [{"cpu": "another"}, {"threads": 1}])
def test_another_machine_s_record_is_not_touched(tmp_path, other):
    path = tmp_path / "run.json"
    append(path, part("ours", 1.0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path}.*{next(iter(other))}"):
        append(path, part("ours", 1.0, **other))
    assert path.read_bytes() == before
