"""moe-fast bench: hands its settings on; names what it does not know."""

import json

import pytest


def test_unknown_operations_are_usage_errors(moe_fast_cli, workspace):
    result = moe_fast_cli("bench", "plan", "nothing", "-o", "new.json")
    assert result.exit_code == 2
    assert "got nothing" in " ".join(result.output.split())
    assert not (workspace / "new.json").exists()


@pytest.mark.parametrize(("flag", "value"), [("--size", "huge"), ("--threads", "0")])
def test_bad_settings_are_usage_errors(moe_fast_cli, workspace, flag, value):
    assert moe_fast_cli("bench", flag, value).exit_code == 2


def test_what_is_measured_is_what_was_asked_for(moe_fast_cli, workspace):
    words = ("plan", "--size", "tiny", "--seconds", "0", "-o", "measured.json")
    assert moe_fast_cli("bench", *words).exit_code == 0
    rows = json.loads((workspace / "measured.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == {"plan"}
