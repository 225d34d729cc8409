"""bench.record: rows go to JSON and come back; strange files are named."""

from __future__ import annotations

import json

import pytest

from bench.harness import Result, Summary, write_json
from bench.machine import Machine, noise
from bench.record import Recorder, Row, Work, read_record

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


def test_groups_of_results_become_rows(tmp_path):
    path = tmp_path / "embedding.json"
    results = [Result("ours", Summary.of([1.0]), SECONDS), Result("theirs", RATIO, SECONDS)]
    write_json(path, {"environment": {"cpu": "x"}, "results": {"bf16": results}, "texts": 3})
    first, second = read_record(path).rows
    assert first.case == ("embedding, bf16", "", "")
    assert (second.who, second.baseline, second.ratio) == ("theirs", "ours", RATIO)


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
