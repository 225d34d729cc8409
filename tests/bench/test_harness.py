"""bench.harness: order, statistics, checks and files; nothing here asserts a duration."""

from __future__ import annotations

import json

import pytest

from bench.harness import (
    Summary,
    alternate,
    environment,
    race,
    summarize,
    table,
    write_json,
)


def test_summary_of_known_values():
    assert Summary.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 1)


def test_alternate_rotates_the_order_and_drops_the_warmup():
    calls: list[str] = []

    def sampler(name):
        def sample():
            calls.append(name)
            return float(len(calls))

        return sample

    samples = alternate({name: sampler(name) for name in "abc"}, rounds=3, warmup=1)
    rounds = [calls[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert [r[0] for r in rounds[1:]] == ["a", "b", "c"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(min(values) for values in samples.values()) > 3  # the first round is not kept


def test_ratios_are_taken_within_a_round():
    # The machine halves its speed in the last round: paired ratios do not notice.
    results = summarize({"new": [1.0, 1.0, 2.0], "old": [2.0, 2.0, 4.0]}, baseline="old")
    assert [r.name for r in results] == ["old", "new"]
    assert results[0].ratio == Summary(1.0, 1.0, 1.0, 3)
    assert results[1].ratio == Summary(0.5, 0.5, 0.5, 3)
    assert results[1].seconds.median == 1.0


@pytest.mark.parametrize(
    ("samples", "baseline", "message"),
    [
        ({"a": [1.0]}, "b", r"baseline must be one of \['a'\]; got 'b'"),
        ({"a": [1.0], "b": []}, "a", "equally many"),
        ({"a": []}, "a", "one or more"),
    ],
)
def test_summarize_refuses(samples, baseline, message):
    with pytest.raises(ValueError, match=message):
        summarize(samples, baseline)


def test_race_and_table():
    runs = {"new": lambda: 1, "old": lambda: 2}
    results = race(runs, baseline="old", rounds=3, warmup=0, min_sample_seconds=0)
    lines = table(results, "a title").splitlines()
    assert lines[0] == "a title (median of 3 rounds)"
    assert "x old" in lines[1]
    assert lines[2].startswith("old  1.000 [1.000, 1.000]")
    assert lines[3].startswith("new ")


def test_a_race_synchronizes_around_each_sample():
    events: list[str] = []
    race(
        {"a": lambda: events.append("run")},
        baseline="a",
        rounds=2,
        warmup=0,
        min_sample_seconds=0,
        synchronize=lambda: events.append("sync"),
    )
    assert events == ["sync", "run", "sync"] * 3  # calibration, two rounds


def test_environment_is_complete_and_can_be_written(tmp_path):
    record = environment(dtype="float32")
    assert record["dtype"] == "float32"
    assert record["versions"]["torch"]
    assert record["threads"] >= 1
    assert record["cpu"]
    write_json(tmp_path / "environment.json", record)
    assert json.loads((tmp_path / "environment.json").read_text()) == record


def test_write_json_makes_folders_and_writes_dataclasses(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, {"summary": Summary(1.0, 0.5, 2.0, 3)})
    expected = {"summary": {"median": 1.0, "q1": 0.5, "q3": 2.0, "count": 3}}
    assert json.loads(path.read_text()) == expected


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"run": 1})
    with pytest.raises(TypeError):
        write_json(path, {"run": object()})
    assert json.loads(path.read_text()) == {"run": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
