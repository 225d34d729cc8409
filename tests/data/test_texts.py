from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the extra moe-fast[train]")

from moe_fast.data import read_texts
from tests.data.files import write, write_jsonl, write_parquet

TEXTS = ["one, “two”", "three\u2028four", " five"]


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_text_file_has_one_text_per_line(tmp_path: Path, name: str, end: str, last: bool):
    path = write(tmp_path / name, end.join(TEXTS) + end * last)
    assert list(read_texts(path)) == [(i, text, None) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.parquet"])
@pytest.mark.parametrize("domain", [True, False])
def test_tables_have_a_column_of_texts_and_perhaps_of_domains(
    tmp_path: Path, name: str, domain: bool
):
    domains = [f"d{i}" for i in range(len(TEXTS))]
    names = ["body", "domain"] if domain else ["body"]
    rows = [dict(zip(names, row, strict=False)) for row in zip(TEXTS, domains, strict=True)]
    if name == "t.csv":
        cells = [names, *(row.values() for row in rows)]
        lines = [",".join(f'"{cell}"' for cell in row) for row in cells]
        path = write(tmp_path / name, "\n".join(lines))
    else:
        path = (write_parquet if name == "t.parquet" else write_jsonl)(tmp_path / name, rows)
    expected = [(i, row["body"], row.get("domain")) for i, row in enumerate(rows)]
    assert list(read_texts(path, "body")) == expected


def test_rows_are_read_one_after_the_other(tmp_path: Path):
    """An error that lies ahead does not keep the rows before it back."""
    path = write(tmp_path / "t.jsonl", '{"text": "x"}\n' * 5 + "broken")
    assert len(list(itertools.islice(read_texts(path), 5))) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "one\n\ntwo\n", "line 2: the text is empty"),
        ("t.txt", "", r"t\.txt: no texts"),
        ("t.jsonl", '{"a": "x"}', r"line 1: column 'text' is missing; columns present: \['a'\]"),
        ("t.jsonl", '{"text": 3}', "line 1: text must be a string, got int"),
        ("t.csv", 'id,text\n1,x\n2,""\n', "line 3: text is empty"),
        (
            "t.jsonl",
            '{"text": "x", "domain": "d"}\n{"text": "x"}',
            "line 2: column 'domain' is in some rows only",
        ),
        (
            "t.jsonl",
            '{"text": "x"}\n{"text": "x", "domain": "d"}',
            "line 2: column 'domain' is in some rows only",
        ),
        ("t.jsonl", "", "no texts"),
        ("t.pdf", "", r"unknown format; supported are \.txt, \.txt\.gz, \.jsonl"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        list(read_texts(write(tmp_path / name, text)))


def test_a_text_file_that_is_not_utf8_names_the_line(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"t\.txt, line 2: not UTF-8"):
        list(read_texts(tmp_path / "t.txt"))


def test_a_missing_file_is_reported_before_the_first_text_is_asked_for(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.txt"):
        read_texts(tmp_path / "none.txt")
