"""mine: a file that train takes, the library's rows, and what it says."""

import pytest

from moe_fast.data import MiningSettings, mine_hard_negatives, read_flag_rows, read_pairs
from moe_fast.evaluation.encoding import EncodeOptions
from moe_fast.inference import load_model
from tests.cli.conftest import read_jsonl, write_jsonl

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")


def test_the_rows_are_the_librarys(moe_fast_cli, workspace):
    flags = ["--model", "mixture", "--negatives", 3, "--max-ratio", 0, "--margin", -0.1]
    result = moe_fast_cli("mine", "pairs.jsonl", *flags, "--same-domain", "-o", "mined.jsonl")
    assert result.exit_code == 0, result.output
    settings = MiningSettings(3, max_ratio=None, margin=-0.1, same_domain=True)
    expected = mine_hard_negatives(
        read_pairs("pairs.jsonl"),
        load_model("mixture", device="cpu"),
        settings=settings,
        encode_options=EncodeOptions(),
    )
    assert read_flag_rows("mined.jsonl").to_list() == expected.rows
    assert f"{expected.report.negatives} negatives out of 24 documents, and their" in result.stdout
    assert "left out:" in result.stdout and "domain" in result.stdout
    assert (workspace / "mined.jsonl.yaml").exists()


def test_training_takes_them(moe_fast_cli, workspace):
    mining = ["--model", "mixture", "--negatives", 2, "--max-ratio", 0, "-o", "mined.jsonl"]
    assert moe_fast_cli("mine", "pairs.jsonl", *mining).exit_code == 0
    training = ["--data", "mined.jsonl", "--loss", "clp", "--symmetric", "--hard-negatives", 2]
    chunks = ["--tokens-per-chunk", 32, "--batch-size", 6, "--max-steps", 2, "--device", "cpu"]
    result = moe_fast_cli("train", "mixture", *training, *chunks, "-o", "out", "--debug")
    assert result.exit_code == 0, result.output


def test_a_corpus_and_a_group_column(moe_fast_cli, workspace):
    rows = [row | {"topic": f"t{i // 2}"} for i, row in enumerate(read_jsonl("pairs.jsonl"))]
    write_jsonl(workspace / "grouped.jsonl", rows)
    write_jsonl(workspace / "more.jsonl", [{"text": "w1 w2 w3"}, {"text": "w30 w31"}])
    flags = ["--group-column", "topic", "--corpus", "more.jsonl", "--max-ratio", 0, "--depth", 50]
    arguments = ["grouped.jsonl", "--model", "dense-model", *flags, "--negatives", 30]
    result = moe_fast_cli("mine", *arguments, "-o", "mined.jsonl")
    assert result.exit_code == 0, result.output
    assert "24 group" in result.stdout and "fewer negatives than asked for" in result.stdout
    mined = read_flag_rows("mined.jsonl", keep=["topic"])
    assert "neg_q" not in mined.column_names
    for row in mined:
        assert len(row["neg"]) == 24 + 2 - 2 and {"w1 w2 w3", "w30 w31"} <= set(row["neg"])


def test_bm25_needs_no_model(moe_fast_cli, workspace):
    pytest.importorskip("bm25s")
    result = moe_fast_cli("mine", "pairs.jsonl", "--bm25", "--negatives", 1, "-o", "mined.jsonl")
    assert result.exit_code == 0, result.output
    assert all(len(row["neg"]) == 1 for row in read_flag_rows("mined.jsonl"))


def test_failures(moe_fast_cli, workspace):
    for given in ([], ["--bm25", "--model", "mixture"]):
        result = moe_fast_cli("mine", "pairs.jsonl", *given, "-o", "x.jsonl")
        assert result.exit_code == 2 and "give --model or --bm25" in result.stderr
    (workspace / "there.jsonl").write_text("mine\n")
    result = moe_fast_cli("mine", "pairs.jsonl", "--model", "mixture", "-o", "there.jsonl")
    assert result.exit_code == 1 and "there.jsonl" in result.stderr
    assert (workspace / "there.jsonl").read_text() == "mine\n"
    flags = ["--model", "mixture", "--skip", 9, "--depth", 9]
    result = moe_fast_cli("mine", "pairs.jsonl", *flags, "-o", "x.jsonl")
    assert result.exit_code == 1 and "skip must be less than depth" in result.stderr
    result = moe_fast_cli("mine", "pairs.jsonl", "--model", "nowhere/", "-o", "x.jsonl")
    assert result.exit_code == 1 and "there is no such folder" in result.stderr
    assert not (workspace / "x.jsonl").exists()


def test_files_as_spreadsheets_have_them(moe_fast_cli, workspace):
    """Semicolons, quotes, an empty cell, and names of their own."""
    pytest.importorskip("bm25s")
    rows = [("what is c", "c is a language"), ("", "x"), ("what is r", "r; is a language")]
    text = "Title;Body\n" + "".join(f'"{a}";"{b}"\n' for a, b in rows)
    (workspace / "mine.csv").write_text(text, encoding="utf-8-sig")
    flags = ["--bm25", "--max-ratio", 0, "--columns", "a=Title,b=Body", "-o", "mined.jsonl"]
    result = moe_fast_cli("mine", "mine.csv", *flags)
    assert result.exit_code == 1 and "mine.csv, line 3: a is empty" in result.stderr
    result = moe_fast_cli("mine", "law=mine.csv", *flags, "--skip-invalid", "--delimiter", ";")
    assert result.exit_code == 0, result.output
    mined = read_flag_rows("mined.jsonl")
    assert mined["domain"] == ["law", "law"] and mined["query"] == ["what is c", "what is r"]
    assert mined["neg"] == [["r; is a language"], ["c is a language"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--delimiter", ";;"], "--delimiter must be one character or 'tab'; got ';;'"),
        (["--delimiter", ";"], "--delimiter ';': there is no CSV file among the data"),
        (["--columns", "question"], "--columns must be OURS=ITS; got 'question'"),
        (["--columns", "a=x,a=y"], "--columns: the name 'a' is there twice"),
        (["--columns", "q=x"], "columns: unknown column 'q'"),
    ],
)
def test_wrong_flags_for_the_data(moe_fast_cli, workspace, flags, message):
    result = moe_fast_cli("mine", "pairs.jsonl", "--bm25", *flags, "-o", "mined.jsonl")
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.replace("│", " ").split())
