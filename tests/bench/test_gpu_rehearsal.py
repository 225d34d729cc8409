"""The rehearsal's file and its table in the docs."""

from __future__ import annotations

import json

import pytest

from bench import gpu_rehearsal as rehearsal


def test_the_page_has_the_table_of_the_committed_file():
    committed = json.loads(rehearsal.FILE.read_text())
    page = rehearsal.PAGE.read_text()
    assert rehearsal.in_page(page, committed) == page


def test_the_calls_compile_in_time():
    """A sample of every call was compiled, and one call in full."""
    committed = json.loads(rehearsal.FILE.read_text())
    versions = committed["environment"]["versions"]
    assert committed["environment"]["python"].startswith("3.12")
    assert versions["torch"].startswith("2.11") and versions["triton"] == "3.6.0"
    assert versions["transformers"] == "5.17.0"
    assert {"1", "2", "3"} <= {call["call"] for call in committed["calls"]}
    assert any(call["kernels"] == call["kernels_collected"] for call in committed["calls"])
    for call in committed["calls"]:
        assert call["kernels"] >= 10 and call["kernels_collected"] > 50 and not call["failed"]
        assert call["estimated_seconds_in_16_processes"] <= 60
        assert sum("needs a GPU" in found for found in call["parts"].values()) > 1


def test_a_call_is_summed_up(tmp_path, monkeypatch):
    parts = {
        "precompile": {"compiled": {"summary": "2 of 2 kernels"}},
        "kernels": {"rehearsed": {"left out": "it needs a GPU"}},
    }
    names = ("python", "versions", "platform", "cpu", "cpus")
    known = {name: name for name in names}
    record = {"environment": {**known, "commit": "abc"}, "parts": parts}
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(record))
    kernels = {str(n): {"name": f"k{n}", "processor_seconds": 16.0 * n} for n in (1, 2)}
    compiled = dict(kernels=kernels, kernels_in_all=4, failures={"x": "y"}, processes=2)
    compiled |= dict(seconds=50.0, seconds_collecting=4.0, processor_seconds=48.0)
    (folder / "compiled.json").write_text(json.dumps(compiled))
    page, file = tmp_path / "page.md", tmp_path / "file.json"
    page.write_text("above\n<!-- rehearsal -->old<!-- end of rehearsal -->\nbelow\n")
    monkeypatch.setattr(rehearsal, "PAGE", page)
    monkeypatch.setattr(rehearsal, "FILE", file)
    assert rehearsal.main([str(folder)]) == 0
    written = json.loads(file.read_text())
    call = written["calls"][0]
    assert written["environment"] == known and (call["call"], call["commit"]) == ("7", "abc")
    assert call["parts"]["kernels"] == "left out: it needs a GPU"
    assert call["failed"] == 1 and call["estimated_seconds_in_16_processes"] == 2 * 48 / 16
    assert call["slowest"][0] == {"kernel": "k2", "processor_seconds": 32.0}
    assert "| 7 | 2 of 4 | 1 | 48 s | 96 s | 6 s |" in page.read_text()
    assert page.read_text().startswith("above\n") and page.read_text().endswith("\nbelow\n")


def test_a_page_without_its_place_is_refused():
    with pytest.raises(ValueError, match="rehearsal"):
        rehearsal.in_page("no place", {"calls": []})
