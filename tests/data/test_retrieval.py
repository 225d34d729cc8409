from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the extra moe-fast[train]")

from moe_fast.data import Retrieval, read_retrieval
from tests.data.files import write, write_jsonl

CORPUS = [
    {"_id": "d1", "title": "Title.", "text": "First text."},
    {"_id": "d2", "title": "", "text": "Second text."},
    {"_id": "d3", "text": "Third text."},
    {"_id": "d4", "title": "A title alone", "text": ""},
]
QUERIES = [{"_id": f"q{i}", "text": f"Query {i}?"} for i in (1, 2, 3)]
QRELS = "query-id\tcorpus-id\tscore\nq2\td1\t1\nq2\td3\t0\nq1\td4\t2\n"
TEXTS = {"d1": "Title. First text.", "d2": "Second text.", "d3": "Third text."} | {
    "d4": "A title alone"
}
JSON = {
    "corpus": TEXTS,
    "queries": {"q1": "Query 1?", "q2": "Query 2?"},
    "qrels": {"q1": {"d4": 2}, "q2": {"d1": 1, "d3": 0}},
}


def _folder(folder: Path, *, corpus=CORPUS, queries=QUERIES, qrels=QRELS, end: str = "") -> Path:
    write_jsonl(folder / f"corpus.jsonl{end}", corpus)
    write_jsonl(folder / f"queries.jsonl{end}", queries)
    write(folder / "qrels" / "test.tsv", qrels)
    return folder


def _with_domains(rows: list[dict]) -> list[dict]:
    return [{**row, "domain": f"of {row['_id']}"} for row in rows]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("qrels", [QRELS, QRELS.split("\n", 1)[1], QRELS.replace("\n", "\r\n")])
def test_a_folder_in_beirs_layout(tmp_path: Path, end: str, qrels: str):
    """Queries that the split does not judge are left out; titles go before their texts."""
    read = read_retrieval(_folder(tmp_path, end=end, qrels=qrels))
    assert read == Retrieval(TEXTS, JSON["queries"], JSON["qrels"])
    assert list(read.qrels) == list(read.queries)


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_one_json_file(tmp_path: Path, name: str):
    read = read_retrieval(write(tmp_path / name, json.dumps(JSON)))
    assert read == Retrieval(TEXTS, JSON["queries"], JSON["qrels"])


def test_domains_of_queries_and_documents(tmp_path: Path):
    domains = {"q1": "of q1", "q2": "of q2"}
    corpus_domains = {key: f"of {key}" for key in TEXTS}
    expected = Retrieval(TEXTS, JSON["queries"], JSON["qrels"], domains, corpus_domains)
    folder = _folder(tmp_path, corpus=_with_domains(CORPUS), queries=_with_domains(QUERIES))
    assert read_retrieval(folder) == expected
    data = {**JSON, "domains": domains, "corpus_domains": corpus_domains}
    assert read_retrieval(write(tmp_path / "r.json", json.dumps(data))) == expected


def test_splits(tmp_path: Path):
    folder = _folder(tmp_path)
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    assert set(read_retrieval(folder).queries) == {"q1", "q2"}  # the only one there is
    write(folder / "qrels" / "train.tsv", "q3\td1\t1\n")
    with pytest.raises(ValueError, match=r"split='test': .* has judgements for \['dev', 'train'\]"):
        read_retrieval(folder)
    assert set(read_retrieval(folder, split="train").queries) == {"q3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"corpus": [*CORPUS, {"_id": "d2", "text": "again"}]},
            r"corpus\.jsonl, line 5: _id 'd2' was given before, .*corpus\.jsonl, line 2",
        ),
        (
            {"queries": [*QUERIES, QUERIES[0]]},
            r"queries\.jsonl, line 4: _id 'q1' was given before, .*queries\.jsonl, line 1",
        ),
        ({"corpus": [{"_id": "d1", "text": " "}]}, r"corpus\.jsonl, line 1: text is empty"),
        (
            {"corpus": [{"_id": 1.5, "text": "x"}]},
            "line 1: _id must be text or a whole number, got",
        ),
        ({"corpus": [{"key": "1", "text": "x"}]}, r"column '_id' is missing; .*\['key', 'text'\]"),
        ({"corpus": []}, r"corpus\.jsonl: no rows"),
        ({"queries": [*_with_domains(QUERIES[:1]), QUERIES[1]]}, "line 2: domain must be in every"),
        ({"queries": [QUERIES[0], *_with_domains(QUERIES[1:])]}, "line 2: domain must be in every"),
        (
            {"qrels": QRELS + "q1\tx1\t1\nq1\tx2\t1\n"},
            r"test\.tsv: 2 unknown documents are named: 'x1', 'x2'; on_missing='drop'",
        ),
        (
            {"qrels": QRELS + "q9\td1\t1\n"},
            r"test\.tsv: 1 unknown queries are named: 'q9'; on_missing='drop'",
        ),
        ({"qrels": QRELS + "q3\td1\t0\n"}, "1 queries have no relevant document: 'q3'"),
        (
            {"qrels": QRELS + "q2\td1\t1\n"},
            r"line 5: query 'q2' and document 'd1' were judged before, in line 2",
        ),
        ({"qrels": QRELS + "q2 d1 1\n"}, "line 5: 1 cells between tabs; expected query id"),
        ({"qrels": "q2\td1\t0.5\n"}, "line 1: relevance must be a whole number .*got '0.5'"),
        ({"qrels": "q2\td1\t1_0\n"}, "line 1: relevance must be a whole number .*got '1_0'"),
        ({"qrels": "q2\td1\t2147483647\n"}, "line 1: relevance .*to 1,000,000, got 2147483647"),
        ({"qrels": "\n"}, r"test\.tsv: no judgements"),
    ],
)
def test_mistakes_in_a_folder(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_retrieval(_folder(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"r\.json: not readable as JSON"),
        ("[]", "expected a JSON object, got a list"),
        ('{"corpus": {}}', r"column 'queries' is missing; columns present: \['corpus'\]"),
        (json.dumps({**JSON, "corpus": {}}), "corpus: expected a JSON object"),
        (json.dumps({**JSON, "corpus": {"d1": ""}}), "corpus: 'd1' is empty"),
        (json.dumps({**JSON, "qrels": {"q1": ["d1"]}}), "qrels: expected a JSON object"),
        (json.dumps({**JSON, "qrels": {"q1": {"d1": True}}}), "whole number .*got True"),
        (json.dumps({**JSON, "qrels": {"q1": {"d1": 10**9}}}), "'d1': relevance .*got 1000000000"),
        ("[" * 100_000, "not readable as JSON"),
        (json.dumps({**JSON, "qrels": {"q1": {"d1": 1}}}), "ids are in only one of .*: 'q2'"),
        (json.dumps({**JSON, "qrels": {"q1": {"x": 1}}}), "1 unknown documents are named: 'x'"),
        (json.dumps({**JSON, "domains": {"q1": "x"}}), "only one of texts and domains: 'q2'"),
        ('{"corpus": {"d1": "x", "d1": "y"}}', "the key 'd1' is given twice"),
    ],
)
def test_mistakes_in_a_json_file(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_retrieval(write(tmp_path / "r.json", text))


def test_a_truncated_json_file(tmp_path: Path):
    whole = gzip.compress(json.dumps(JSON).encode())
    (tmp_path / "r.json.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"r\.json\.gz: not readable as JSON"):
        read_retrieval(tmp_path / "r.json.gz")


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*none"):
        read_retrieval(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no corpus.jsonl or corpus.jsonl.gz in this"):
        read_retrieval(tmp_path)
    folder = _folder(tmp_path / "r")
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"qrels: no \.tsv file in this folder"):
        read_retrieval(folder)
    with pytest.raises(ValueError, match="expected a folder in BEIR's layout, a .json or"):
        read_retrieval(write(tmp_path / "r.csv", ""))
    with pytest.raises(ValueError, match="split='dev': .* is one file, which has no splits"):
        read_retrieval(write(tmp_path / "r.json", json.dumps(JSON)), split="dev")


MISSING = QRELS + "q1\tgone\t1\nq3\tgone\t1\nq3\td5\t1\nq9\td1\t1\n"
EMPTY = {"_id": "d5", "title": "", "text": ""}


def test_a_lenient_reading_drops_what_is_missing_and_counts_it(tmp_path: Path, caplog):
    folder = _folder(tmp_path, corpus=[*CORPUS, EMPTY], qrels=MISSING)
    read = read_retrieval(folder, on_missing="drop")
    assert (read.corpus, read.queries, read.qrels) == (TEXTS, JSON["queries"], JSON["qrels"])
    assert read.dropped == {"documents": 1, "judgements": 4, "queries": 2}
    [said] = caplog.messages
    assert said.endswith(
        "left out, as on_missing='drop' asks: 1 documents, 4 judgements, 2 queries"
    )


def test_a_lenient_reading_of_one_json_file(tmp_path: Path):
    changed = {
        "corpus": {**TEXTS, "d5": ""},
        "queries": {**JSON["queries"], "q3": "Query 3?"},
        "qrels": {**JSON["qrels"], "q3": {"d5": 1, "gone": 1}},
        "corpus_domains": dict.fromkeys([*TEXTS, "d5"], "x"),
        "domains": None,
    }
    path = write(tmp_path / "r.json", json.dumps(changed))
    with pytest.raises(ValueError, match="corpus: 'd5' is empty"):
        read_retrieval(path)
    read = read_retrieval(path, on_missing="drop")
    assert (read.corpus, read.queries, read.qrels) == (TEXTS, JSON["queries"], JSON["qrels"])
    assert read.domains is None and set(read.corpus_domains) == set(TEXTS)


def test_nothing_missing_is_nothing_dropped(tmp_path: Path, caplog):
    assert read_retrieval(_folder(tmp_path), on_missing="drop").dropped == {}
    assert not caplog.messages
    with pytest.raises(ValueError, match="on_missing must be 'error' or 'drop'; got 'skip'"):
        read_retrieval(tmp_path, on_missing="skip")


def test_ids_may_be_whole_numbers_and_called_id(tmp_path: Path):
    corpus = [{"id": 7, "text": "x", "domain": None}, {"id": "8", "text": "y", "domain": None}]
    folder = _folder(tmp_path, corpus=corpus, qrels="q1\t7\t1\n")
    assert read_retrieval(folder).corpus == {"7": "x", "8": "y"}
