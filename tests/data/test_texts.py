"""Texts of a file, with ids, domains and places."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_fast.data import read_texts

ROWS = [
    {"_id": "a", "text": "one", "title": "first", "domain": "law"},
    {"_id": "b", "text": "two", "title": "", "domain": "art"},
]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_formats_with_columns(suffix, tmp_path):
    rows = list(read_texts(write(tmp_path / f"t{suffix}"), domain_column="domain"))
    assert [(r.text, r.id, r.domain) for r in rows] == [("one", "a", "law"), ("two", "b", "art")]
    assert all(f"t{suffix}, " in row.where for row in rows)


@pytest.mark.parametrize("opened", [open, gzip.open])
def test_lines(opened, tmp_path):
    path = tmp_path / ("t.txt.gz" if opened is gzip.open else "t.txt")
    with opened(path, "wt", newline="") as file:
        file.write("one\r\ntwo  words\n")
    assert [(r.text, r.id) for r in read_texts(path)] == [("one", "0"), ("two  words", "1")]


def test_several_columns_are_joined_and_empty_ones_left_out(tmp_path):
    rows = read_texts(write(tmp_path / "t.jsonl"), columns=("title", "text"))
    assert [row.text for row in rows] == ["first one", "two"]


def test_row_numbers_are_the_ids_of_rows_without(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "x"}, {"id": 7, "text": "y"}])
    assert [row.id for row in read_texts(path)] == ["0", "7"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "x"}, {"body": "y"}], {}, r"line 2: column 'text' is missing; .*\['body'\]"),
        ([{"text": " "}], {}, "line 1: text is empty"),
        ([{"text": 3}], {}, "line 1: text must be a string, got int"),
        ([{"text": "x"}], {"domain_column": "d"}, "line 1: column 'd' is missing"),
        ([{"text": "x", "d": ""}], {"domain_column": "d"}, "line 1: d is empty"),
        ([{"text": "x", "id": None}], {}, "line 1: id must be text or a whole number, got None"),
        ([{"a": "", "b": ""}], {"columns": ("a", "b")}, r"line 1: a \+ b is empty"),
        ([{"a": "x", "b": 3}], {"columns": ("a", "b")}, "line 1: b must be a string"),
    ],
)
def test_bad_rows(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(read_texts(write(tmp_path / "t.jsonl", rows), **options))


def test_a_table_with_names_of_its_own_and_rows_that_are_none(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("key|body|area\nk1|one|law\nk2||law\nk3|two\nk4|three; four|art\n")
    options = {"columns": ["body"], "id_column": "key", "domain_column": "area", "delimiter": "|"}
    refused = []
    rows = list(read_texts(path, **options, invalid=refused.append))
    assert [(row.id, row.text, row.domain) for row in rows] == [
        ("k1", "one", "law"),
        ("k4", "three; four", "art"),
    ]
    places = [str(error).removeprefix(f"{path}, ") for error in refused]
    assert places == ["line 3: body is empty", "line 4: 2 cells, but the header names 3"]
    with pytest.raises(ValueError, match="line 3: body is empty"):
        list(read_texts(path, **options))
    with pytest.raises(ValueError, match="line 2: column 'none' is missing"):
        list(read_texts(path, columns=["body"], id_column="none", delimiter="|"))


def test_lines_that_are_no_texts_are_left_out_and_the_others_counted(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\n\n\xff\ntwo\n")
    refused = []
    rows = list(read_texts(path, invalid=refused.append))
    assert [(row.id, row.text, row.where) for row in rows] == [
        ("0", "one", f"{path}, line 1"),
        ("1", "two", f"{path}, line 4"),
    ]
    assert len(refused) == 2
    with pytest.raises(ValueError, match="id_column='id' needs a file with columns"):
        list(read_texts(path, id_column="id"))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*none.jsonl"):
        list(read_texts(tmp_path / "none.jsonl"))
    (tmp_path / "t.xml").write_text("<t/>")
    with pytest.raises(ValueError, match=r"t.xml'.*supported are .txt"):
        list(read_texts(tmp_path / "t.xml"))
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    with pytest.raises(ValueError, match="t.txt, line 2: text is empty"):
        list(read_texts(tmp_path / "t.txt"))
    with pytest.raises(ValueError, match="domain_column='domain' needs a file with columns"):
        list(read_texts(tmp_path / "t.txt", domain_column="domain"))


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_an_empty_file_is_an_error(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name}: no texts in this file"):
        list(read_texts(tmp_path / name))
