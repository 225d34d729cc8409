"""moe-fast bench: hands its settings on; names what it does not know."""

import importlib.util
import json
import sys

import pytest

from bench.harness import ROOT
from moe_fast.cli import bench as command


def test_unknown_operations_are_usage_errors(moe_fast_cli, workspace):
    result = moe_fast_cli("bench", "plan", "nothing", "-o", "new.json")
    assert result.exit_code == 2
    assert "got nothing" in " ".join(result.output.replace("│", "").split())
    assert not (workspace / "new.json").exists()


@pytest.mark.parametrize(
    ("flag", "value"), [("--size", "huge"), ("--threads", "0"), ("--processes", "0")]
)
def test_bad_settings_are_usage_errors(moe_fast_cli, workspace, flag, value):
    assert moe_fast_cli("bench", flag, value).exit_code == 2


def test_what_is_measured_is_what_was_asked_for(moe_fast_cli, workspace):
    words = ("plan", "--size", "tiny", "--seconds", "0", "--processes", "2", "-o", "measured.json")
    assert moe_fast_cli("bench", *words).exit_code == 0
    record = json.loads((workspace / "measured.json").read_text())
    assert {row["operation"] for row in record["rows"]} == {"plan"}
    assert record["environment"]["processes"] == 2
    assert record["rows"][0]["ratio"]["count"] == 2  # rounds: one in each process


def test_the_installed_form_needs_no_checkout(monkeypatch, tmp_path):
    """A wheel holds bench/ as moe_fast.bench; nothing of it may ask for a package called bench."""
    name, folder = "moe_fast.bench", ROOT / "bench"
    options = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", **options)
    before = set(sys.modules)
    monkeypatch.setattr(command, "_CHECKOUT", tmp_path)
    monkeypatch.setitem(sys.modules, "bench", None)  # importing it is an error
    monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
    try:
        found = command._bench()
        assert found.__name__ == "moe_fast.bench.__main__"
        for operation in found.OPERATIONS:
            importlib.import_module(f"{name}.{operation}")
    finally:
        for module in set(sys.modules) - before:
            if module.startswith(name):
                del sys.modules[module]
