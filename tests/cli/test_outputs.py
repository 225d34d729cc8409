"""Names of outputs, and --overwrite: what a command reads, and where it stands, stays."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from moe_fast.cli.command import Run
from tests.cli.conftest import write_jsonl


@pytest.fixture
def inputs(workspace):
    """A result to overwrite, with an input in it, and the files that commands read."""
    write_jsonl(workspace / "mine.jsonl", [{"a": "w1", "b": "w2", "text": "w1", "domain": "law"}])
    for name in ("mine.png", "mine.json", "mine.parquet"):
        (workspace / name).write_text("the only copy")
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
        ["evaluate", "mixture", "--pairs", "law=mine.json", "--json", "mine.json"],
        ["inspect", "mixture", "--texts", "mine.png", "-o", "mine.png"],
        ["embed", "mixture", "law=mine.parquet", "-o", "mine.parquet"],
        ["search", "--documents", "old/data.jsonl", "--save-index", "old"],
    ],
)
def test_inputs_are_not_replaced(arguments, inputs, moe_fast_cli):
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    result = moe_fast_cli(*arguments, "--overwrite")
    assert result.exit_code == 1, result.output
    assert "--overwrite: " in result.stderr
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


def test_a_model_may_be_replaced_by_its_successor(inputs, moe_fast_cli):
    assert moe_fast_cli("upcycle", "dense-model", "--num-experts", 2, "-o", "m").exit_code == 0
    result = moe_fast_cli("extract", "m", "--expert", 1, "-o", "m", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "the model is dense" in moe_fast_cli("inspect", "m").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "m", "t.jsonl", "-o", "x.csv"], "--output x.csv: .* .npy, .parquet; got .csv"),
        (["embed", "m", "t.jsonl", "-o", "x"], "got a name without a suffix"),
        (["embed", "m", "t.jsonl", "-o", "x.npy.gz"], "got .gz"),
        (["search", "--documents", "t.npy", "--queries", "t.npy", "-o", "x.csv"], ".trec.gz"),
        (["search", "--documents", "t.npy", "--save-index", "x.npy"], "will be a folder"),
        (["evaluate", "m", "--pairs", "p.jsonl", "--json", "x.csv"], "--json x.csv: .* .json.gz"),
        (["inspect", "m", "--texts", "t.jsonl", "-o", "usage"], ".png, .svg, .pdf"),
        (["inspect", "m", "--texts", "t.jsonl", "-o", "usage.csv"], "got .csv"),
        (["inspect", "m", "--json", "x.yaml"], "got .yaml"),
        (["mine", "p.jsonl", "--bm25", "-o", "x.csv"], ".jsonl, .jsonl.gz, .parquet; got .csv"),
        (["bench", "plan", "-o", "x.csv"], "got .csv"),
        (["cocite", "p.jsonl", "-o", "x.jsonl"], "x.jsonl will be a folder"),
        (["upcycle", "m", "--num-experts", "2", "-o", "x.safetensors"], "will be a folder"),
        (["extract", "m", "--expert", "0", "-o", "x.bin"], "will be a folder"),
        (["join", "a=b", "c=d", "-o", "x.pt"], "will be a folder"),
        (["train", "m", "--data", "p.jsonl", "-o", "x.zip"], "will be a folder"),
        (["demo", "-o", "x.md"], "will be a folder"),
    ],
)
def test_a_name_that_promises_another_format_is_refused(
    arguments, message, moe_fast_cli, workspace
):
    before = set(workspace.iterdir())
    result = moe_fast_cli(*arguments)  # the inputs are not there: nothing has been looked at yet
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.stderr.replace("│", " ").split()))
    assert set(workspace.iterdir()) == before


def test_what_is_written_has_the_format_of_its_name(moe_fast_cli, workspace):
    assert moe_fast_cli("inspect", "dense-model", "--json", "x.json.gz").exit_code == 0
    with gzip.open("x.json.gz", "rt") as file:
        assert json.load(file)["model"] == "dense-model"
    texts = ["--texts", "law=texts.jsonl"]
    for name, start in (("u.PNG", b"\x89PNG"), ("u.pdf", b"%PDF"), ("u.svg", b"<?xml")):
        result = moe_fast_cli("inspect", "mixture", *texts, "-o", name)
        assert result.exit_code == 0, result.output
        assert (workspace / name).read_bytes().startswith(start)


def test_control_characters_of_files_are_escaped_where_they_are_shown(inputs, moe_fast_cli):
    """A file must not write to the terminal of whoever reads a message about it."""
    shutil.copytree((inputs / "mixture").resolve(), inputs / "planted")
    config = inputs / "planted" / "config.json"
    planted = json.loads(config.read_text()) | {"default_domain": "\x1b[2Jx"}
    config.write_text(json.dumps(planted))
    result = moe_fast_cli("inspect", "planted")
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


_SEARCH = ["search", "--model", "mixture", "--domain", "law", "--documents", "texts.jsonl"]


@pytest.mark.parametrize("written", [False, True], ids=["before them", "after them"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "mixture", "law=texts.jsonl", "-o", "x.npy"],
        ["mine", "pairs.jsonl", "--model", "mixture", "--max-ratio", "0", "-o", "x.jsonl"],
        ["evaluate", "mixture", "--pairs", "pairs.jsonl", "--resamples", "0", "--json", "x.json"],
        [*_SEARCH, "--queries", "queries.jsonl", "-o", "x.trec"],
        [*_SEARCH, "--save-index", "x"],
    ],
    ids=["embed", "mine", "evaluate", "search", "index"],
)
def test_killed_at_its_settings_the_same_command_runs_again(
    arguments, written, inputs, moe_fast_cli, monkeypatch
):
    """A result has its settings beside it, or the same command goes on and gives both."""
    if arguments[0] == "search":
        pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")
    save_settings = Run.save_settings

    def die(self, result):
        if written:
            save_settings(self, result)
        raise KeyboardInterrupt

    output = Path(arguments[-1])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_settings", die)
        assert moe_fast_cli(*arguments, "--quiet").exit_code != 0
    result = moe_fast_cli(*arguments, "--quiet")
    assert result.exit_code == 0, result.output
    settings = output / "search.yaml" if output.is_dir() else Path(f"{output}.yaml")
    assert output.exists() and settings.is_file()
