"""--overwrite: what a command reads, and where it stands, is never what it replaces."""

import json

import pytest

from tests.cli.conftest import write_jsonl


@pytest.fixture
def inputs(workspace):
    """A result to overwrite, with an input in it, and the files that commands read."""
    write_jsonl(workspace / "mine.jsonl", [{"a": "w1", "b": "w2", "text": "w1", "domain": "law"}])
    (workspace / "old").mkdir()
    (workspace / "old" / "data.jsonl").write_bytes((workspace / "mine.jsonl").read_bytes())
    return workspace


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "mixture", "--data", "old/data.jsonl", "-o", "old"],
        ["train", "mixture", "--data", "law=old/data.jsonl", "-o", "old"],
        ["train", "mixture", "--data", "pairs.jsonl", "--eval-data", "old/data.jsonl", "-o", "old"],
        ["train", "mixture", "--data", "mine.jsonl", "-o", "."],
        ["upcycle", "dense-model", "--num-experts", "2", "-o", ".."],
        ["cocite", "old/data.jsonl", "-o", "old"],
        ["evaluate", "mixture", "--pairs", "mine.jsonl", "--json", "mine.jsonl"],
        ["inspect", "mixture", "--texts", "mine.jsonl", "-o", "mine.jsonl"],
        ["search", "--documents", "old/data.jsonl", "--save-index", "old"],
    ],
)
def test_inputs_are_not_replaced(arguments, inputs, moe_fast_cli):
    before = {path: path.read_bytes() for path in inputs.rglob("*.jsonl")}
    result = moe_fast_cli(*arguments, "--overwrite")
    assert result.exit_code == 1, result.output
    assert "--overwrite: " in result.stderr
    assert {path: path.read_bytes() for path in inputs.rglob("*.jsonl")} == before


def test_a_model_may_be_replaced_by_its_successor(inputs, moe_fast_cli):
    assert moe_fast_cli("upcycle", "dense-model", "--num-experts", 2, "-o", "m").exit_code == 0
    result = moe_fast_cli("extract", "m", "--expert", 1, "-o", "m", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "the model is dense" in moe_fast_cli("inspect", "m").stdout


def test_control_characters_of_files_are_escaped_where_they_are_shown(inputs, moe_fast_cli):
    """A file must not write to the terminal of whoever reads a message about it."""
    config = inputs / "mixture" / "config.json"
    planted = json.loads(config.read_text()) | {"default_domain": "\x1b[2Jx"}
    config.write_text(json.dumps(planted))
    result = moe_fast_cli("inspect", "mixture")
    assert result.exit_code == 1 and "\x1b" not in result.output + result.stderr
    assert r"\x1b[2Jx" in result.stderr


def test_a_second_run_on_an_output_is_refused(inputs, moe_fast_cli):
    from moe_fast.files import exclusive

    mine = ["mine", "pairs.jsonl", "--bm25", "-o", "mined.jsonl"]
    with exclusive("mined.jsonl"):
        result = moe_fast_cli(*mine)
    assert result.exit_code == 1 and "mined.jsonl is being written by another run" in result.stderr
    assert moe_fast_cli(*mine).exit_code == 0
    assert not list(inputs.glob(".mined*"))
