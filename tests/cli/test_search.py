"""search: the run file holds the exact cosine ranking, whatever the documents come from."""

import json

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from moe_fast.evaluation import read_run
from moe_fast.inference import load_model


def rows(name):
    with open(name) as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def expected(workspace):
    """{query id: document ids by falling cosine}, by NumPy."""
    model = load_model("mixture", device="cpu")
    documents, queries = rows("texts.jsonl"), rows("queries.jsonl")
    a, b = (
        model.encode([row["text"] for row in part], domain="law", normalize_embeddings=True)
        for part in (queries, documents)
    )
    order = np.argsort(-(a @ b.T).astype(np.float64), axis=1, kind="stable")
    return {
        query["_id"]: [documents[i]["id"] for i in row]
        for query, row in zip(queries, order, strict=True)
    }


MODEL = ["--model", "mixture", "--domain", "law"]


def search(moe_fast_cli, *arguments):
    result = moe_fast_cli("search", *arguments, "--quiet")
    assert result.exit_code == 0, result.output
    return {query: list(hits) for query, hits in read_run("run.trec").items()}


def test_texts_vectors_and_a_saved_index_rank_alike(moe_fast_cli, expected, workspace):
    queries = ["--queries", "queries.jsonl", "-o", "run.trec", "-k", 5, "--overwrite"]
    top = {query: ids[:5] for query, ids in expected.items()}
    assert top["q0"][0] == "d3" and top["q1"][0] == "d8"
    assert search(moe_fast_cli, *MODEL, "--documents", "texts.jsonl", *queries) == top

    embed = ["embed", "mixture", "texts.jsonl", "--domain", "law", "-o", "v.parquet"]
    assert moe_fast_cli(*embed).exit_code == 0
    assert search(moe_fast_cli, *MODEL, "--documents", "v.parquet", *queries) == top

    search(moe_fast_cli, "--documents", "v.parquet", "--save-index", "index")
    assert search(moe_fast_cli, *MODEL, "--load-index", "index", *queries) == top
    embed = ["embed", "mixture", "queries.jsonl", "--domain", "law", "-o", "q.parquet"]
    assert moe_fast_cli(*embed).exit_code == 0
    queries[1] = "q.parquet"  # no model is needed
    assert search(moe_fast_cli, "--load-index", "index", *queries, "--tag", "mine") == top
    assert (workspace / "run.trec").read_text().splitlines()[0].split()[-1] == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--documents", "texts.jsonl", "--save-index", "i", *MODEL, "--index", "No"],
            "index='No'",
        ),
        (
            ["--load-index", "none", "--queries", "queries.jsonl", "-o", "r", *MODEL],
            "no file index",
        ),
        (["--documents", "none.npy", "--save-index", "i"], "there is no file none.npy"),
    ],
)
def test_failures(arguments, message, moe_fast_cli):
    result = moe_fast_cli("search", *arguments)
    assert result.exit_code == 1 and message in result.stderr


def test_texts_need_a_model(moe_fast_cli):
    result = moe_fast_cli("search", "--documents", "texts.jsonl", "--save-index", "i")
    assert result.exit_code == 2 and "--model must be given" in result.stderr


def test_a_saved_index_keeps_its_own_settings(moe_fast_cli):
    assert (
        moe_fast_cli("embed", *MODEL[1:2], "texts.jsonl", *MODEL[2:], "-o", "v.npy").exit_code == 0
    )
    assert moe_fast_cli("search", "--documents", "v.npy", "--save-index", "index").exit_code == 0
    saved = ["search", "--load-index", "index", "--queries", "v.npy", "-o", "r"]
    result = moe_fast_cli(*saved, "--index", "HNSW8,Flat")
    assert result.exit_code == 2 and "--index HNSW8,Flat is for --documents" in result.stderr
    result = moe_fast_cli(*saved, "--no-normalize")
    assert result.exit_code == 1 and "--no-normalize: the index in index ranks" in result.stderr


def test_ids_that_a_run_file_cannot_hold(moe_fast_cli, workspace):
    (workspace / "q.jsonl").write_text('{"id": "two words", "text": "w1"}')
    arguments = ["--documents", "texts.jsonl", "--queries", "q.jsonl", "-o", "r", *MODEL]
    result = moe_fast_cli("search", *arguments)
    assert result.exit_code == 1 and "'two words'" in result.stderr
    assert not (workspace / "r").exists()


def test_duplicate_query_ids(moe_fast_cli, workspace):
    (workspace / "q.jsonl").write_text('{"id": "q", "text": "w1"}\n{"id": "q", "text": "w2"}')
    arguments = ["--documents", "texts.jsonl", "--queries", "q.jsonl", "-o", "r", *MODEL]
    result = moe_fast_cli("search", *arguments)
    assert result.exit_code == 1 and "query id 'q' is there twice" in result.stderr
