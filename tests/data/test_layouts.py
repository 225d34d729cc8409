"""Sets in the folders and files in which MIRACL, MLDR and pyserini have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_fast.data import Retrieval, read_retrieval, read_retrieval_files
from tests.data.files import write, write_jsonl

DOCUMENTS = [
    {"docid": "12#0", "title": "Seoul", "text": "A city."},
    {"docid": "12#1", "title": "Seoul", "text": "Its river."},
    {"docid": "9#0", "title": "", "text": "A bridge."},
]
TEXTS = {"12#0": "Seoul A city.", "12#1": "Seoul Its river.", "9#0": "A bridge."}
QRELS = "7\tQ0\t12#1\t1\n7\tQ0\t9#0\t0\n8\tQ0\t9#0\t1\n"
EXPECTED = Retrieval(
    TEXTS,
    {"7": "Which river?", "8": "Which bridge?"},
    {"7": {"12#1": 1, "9#0": 0}, "8": {"9#0": 1}},
)


def miracl(folder: Path) -> Path:
    folder = folder / "miracl-v1.0-ko"
    write_jsonl(folder / "docs-0.jsonl.gz", DOCUMENTS[:2])
    write_jsonl(folder / "docs-1.jsonl.gz", DOCUMENTS[2:])
    topics = "7\tWhich river?\n8\tWhich bridge?\n9\tNot judged?\n"
    write(folder / "topics" / "topics.miracl-v1.0-ko-dev.tsv", topics)
    write(folder / "topics" / "topics.miracl-v1.0-ko-test-a.tsv", "1\tA\n")
    write(folder / "qrels" / "qrels.miracl-v1.0-ko-dev.tsv", QRELS)
    return folder


def mldr(folder: Path) -> Path:
    folder = folder / "MLDR" / "mldr-v1.0-ko"
    write_jsonl(folder / "corpus.jsonl.gz", [{**row, "title": None} for row in DOCUMENTS])
    queries = [
        {"query_id": "7", "query": "Which river?", "positive_passages": [], "negative_passages": []}
    ]
    write_jsonl(folder / "test.jsonl.gz", queries)
    write_jsonl(folder / "dev.jsonl.gz", [{**queries[0], "query_id": "5"}])
    for language, split, text in (
        ("ko", "test", "7 Q0 9#0 1\n"),
        ("ko", "dev", "5 Q0 9#0 1\n"),
        ("de", "test", "7 Q0 other 1\n"),
    ):
        write(folder.parent / "qrels" / f"qrels.mldr-v1.0-{language}-{split}.tsv", text)
    return folder


def test_miracl(tmp_path: Path):
    folder = miracl(tmp_path)
    assert read_retrieval(folder) == EXPECTED
    assert read_retrieval(folder, split="dev") == EXPECTED
    with pytest.raises(ValueError, match=r"split='train': .* has judgements for \['dev'\]"):
        read_retrieval(folder, split="train")


def test_mldr(tmp_path: Path):
    folder = mldr(tmp_path)
    read = read_retrieval(folder)
    assert read.queries == {"7": "Which river?"} and read.qrels == {"7": {"9#0": 1}}
    assert read.corpus["12#1"] == "Its river."
    assert read_retrieval(folder, split="dev").qrels == {"5": {"9#0": 1}}


def test_files_in_different_places(tmp_path: Path):
    folder = miracl(tmp_path)
    qrels = folder / "qrels" / "qrels.miracl-v1.0-ko-dev.tsv"
    topics = folder / "topics" / "topics.miracl-v1.0-ko-dev.tsv"
    assert read_retrieval_files(folder, topics, qrels) == EXPECTED
    contents = [{"id": key, "contents": text} for key, text in TEXTS.items()]  # pyserini's
    corpus = write_jsonl(tmp_path / "corpus.jsonl", contents)
    queries = [{"qid": key, "text": text} for key, text in EXPECTED.queries.items()]
    found = read_retrieval_files(corpus, write_jsonl(tmp_path / "q.jsonl", queries), qrels)
    assert found == EXPECTED


def test_what_is_missing_is_named(tmp_path: Path):
    folder = miracl(tmp_path)
    for path in folder.glob("docs-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no corpus.jsonl or .* docs-0.jsonl.gz in this"):
        read_retrieval(folder)
    (folder / "topics" / "topics.miracl-v1.0-ko-dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="topics: no topics.miracl-v1.0-ko-dev.tsv"):
        read_retrieval(folder)
    folder = mldr(tmp_path)
    (folder / "test.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no queries.jsonl or test.jsonl \(.gz\)"):
        read_retrieval(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("7\n", "line 1: 1 cells between tabs"), ("7\t\n", "line 1: text is empty")],
)
def test_topics_that_cannot_be_read(tmp_path: Path, text: str, message: str):
    folder = miracl(tmp_path)
    write(folder / "topics" / "topics.miracl-v1.0-ko-dev.tsv", text)
    with pytest.raises(ValueError, match=message):
        read_retrieval(folder)
    row = json.dumps({"docid": "a", "body": "b"})
    (folder / "docs-0.jsonl.gz").unlink()
    write(folder / "docs-0.jsonl", row)
    with pytest.raises(ValueError, match=r"docs-0.jsonl, line 1: column 'text' is missing"):
        read_retrieval(folder)
