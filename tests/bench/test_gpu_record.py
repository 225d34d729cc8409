"""The record of the GPU script: written at once, resumed, and never later than the deadline."""

from __future__ import annotations

import json
import time

import pytest

from bench import gpu_record
from bench.gpu_record import Results


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "record.json"


def test_every_measurement_is_in_the_file_at_once(path):
    results = Results(path, {"environment": {"gpu": "none"}})
    assert results.measure("kernels", "up", lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert read(path)["parts"] == {"kernels": {"up": {"ms": 1.0}}}
    assert read(path)["environment"] == {"gpu": "none"}

    def second():
        results.note("kernels", "down", {"so far": 1})
        assert read(path)["parts"]["kernels"] == {"up": {"ms": 1.0}, "down": {"so far": 1}}
        return {"ms": 2.0}

    results.measure("kernels", "down", second)
    assert read(path)["parts"]["kernels"]["down"] == {"ms": 2.0}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_a_failure_leaves_the_others(path):
    results = Results(path, {})

    def broken():
        raise RuntimeError("no such luck")

    assert "no such luck" in results.measure("a", "one", broken)["error"]
    results.measure("a", "two", lambda: 2)
    results.measure("b", "three", lambda: {"inner": {"failures": ["x"]}})
    assert results.finish() == ["a, one", "b, three"]
    assert read(path)["parts"]["a"]["two"] == 2


def test_nothing_begins_after_the_deadline(path):
    with Results(path, {}, seconds=30) as results:
        assert results.measure("a", "one", lambda: 1) == 1
        assert "left out" in results.measure("a", "long", lambda: 1, least=60)
    with Results(path, {}, seconds=30, started=time.monotonic() - 31) as results:
        assert "0 s were left" in results.measure("a", "late", lambda: 1)["left out"]
        assert results.finish() == []  # what was left out has not failed


def test_the_time_is_watched_no_longer_after_the_run(path):
    with pytest.raises(KeyboardInterrupt), Results(path, {}, seconds=30) as results:
        assert results._watch.is_alive()
        raise KeyboardInterrupt
    results._watch.join(5)
    assert not results._watch.is_alive()


def test_what_does_not_end_is_cut_off(path, monkeypatch):
    ended = []
    monkeypatch.setattr(gpu_record, "GRACE", 0.1)
    monkeypatch.setattr(gpu_record.os, "_exit", ended.append)
    with Results(path, {}, seconds=0.05) as results:
        results.measure("a", "fast", lambda: 1)
        results.measure("a", "hangs", lambda: time.sleep(0.5))
    assert ended == [gpu_record.CUT_OFF]
    # The test's process goes on; what the file held then is what a real run leaves.
    assert read(path)["parts"]["a"]["fast"] == 1


def test_a_record_is_resumed(path):
    first = Results(path, {})
    first.measure("a", "one", lambda: 1)
    first.measure("a", "two", lambda: 1 / 0)
    first.measure("b", "three", lambda: 3)
    second = Results(path, {}, known=gpu_record.read_parts(path))
    assert second.measure("a", "one", lambda: pytest.fail("it is known")) == 1
    assert second.measure("a", "two", lambda: 2) == 2
    second.finish()
    assert read(path)["parts"] == {"a": {"one": 1, "two": 2}, "b": {"three": 3}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": {"a": 1}}'])
def test_another_file_is_refused(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json is no record of bench\.gpu"):
        gpu_record.read_parts(path)
    with pytest.raises(ValueError, match=r"missing\.json is no record"):
        gpu_record.read_parts(path.with_name("missing.json"))


def test_the_age_of_the_process_includes_its_imports():
    assert gpu_record.process_age() > 0.1
