"""search: the run file holds the exact cosine ranking, whatever the documents come from."""

import gzip
import json

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from moe_fast import add_three_heads, load_three_heads
from moe_fast.encoding.head_outputs import head_scores
from moe_fast.encoding.three_heads import OUTPUTS
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

    for file in ("v.parquet", "v.npy"):
        embed = ["embed", "mixture", "law=texts.jsonl", "-o", file]
        assert moe_fast_cli(*embed).exit_code == 0
        assert search(moe_fast_cli, *MODEL, "--documents", file, *queries) == top

    search(moe_fast_cli, "--documents", "v.parquet", "--save-index", "index")
    assert search(moe_fast_cli, *MODEL, "--load-index", "index", *queries) == top
    embed = ["embed", "mixture", "queries.jsonl", "--domain", "law", "-o", "q.parquet"]
    assert moe_fast_cli(*embed).exit_code == 0
    queries[1] = "q.parquet"  # no model is needed
    assert search(moe_fast_cli, "--load-index", "index", *queries, "--tag", "mine") == top
    assert (workspace / "run.trec").read_text().splitlines()[0].split()[-1] == "mine"


def test_tables_as_spreadsheets_have_them(moe_fast_cli, expected, workspace):
    """embed and search: semicolons, names of their own, and a row that is none."""
    lines = [f"{row['id']};{row['text']}" for row in rows("texts.jsonl")]
    (workspace / "t.csv").write_text("\n".join(["key;body", *lines[:5], "x;", *lines[5:]]) + "\n")
    reading = ["--columns", "text=body,id=key", "--delimiter", ";", "--skip-invalid"]
    assert moe_fast_cli("embed", "mixture", "law=t.csv", *reading, "-o", "v.npy").exit_code == 0
    queries = [{"key": row["_id"], "body": row["text"]} for row in rows("queries.jsonl")]
    (workspace / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    for documents in ("v.npy", "t.csv"):
        flags = reading if documents == "t.csv" else reading[:2]
        flags = [*flags, "--documents", documents, "--queries", "q.jsonl", "-o", "run.trec"]
        assert search(moe_fast_cli, *MODEL, *flags, "-k", 99, "--overwrite") == expected
    result = moe_fast_cli("embed", "mixture", "law=t.csv", *reading[:4], "-o", "w.npy")
    assert result.exit_code == 1 and "t.csv, line 7: body is empty" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--columns", "a=x"], "of texts there are text, id and domain; got a"),
        (["--columns", "text=x", "--text-column", "y"], "--text-column or --columns text=x, not"),
        (["--columns", "domain=x", "--domain-column", "y"], "--columns domain=x, not both"),
        (["--delimiter", ";"], "there is no CSV file among the data"),
    ],
)
def test_flags_that_do_not_fit_the_texts(flags, message, moe_fast_cli):
    result = moe_fast_cli("embed", "mixture", "texts.jsonl", *flags, "-o", "v.npy")
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_each_file_has_its_domain(moe_fast_cli, workspace):
    model = load_model("mixture", device="cpu")
    texts = {"law": rows("texts.jsonl"), "medicine": rows("queries.jsonl")}
    a, b = (
        model.encode([row["text"] for row in part], domain=domain, normalize_embeddings=True)
        for domain, part in texts.items()
    )
    files = ["--documents", "law=texts.jsonl", "--queries", "medicine=queries.jsonl"]
    assert search(moe_fast_cli, *MODEL[:2], *files, "-k", 1, "-o", "run.trec") == {
        query["_id"]: [texts["law"][best]["id"]]
        for query, best in zip(texts["medicine"], (b @ a.T).argmax(1), strict=True)
    }


def test_vectors_without_ids_have_row_numbers_and_it_is_said(moe_fast_cli, workspace):
    np.save("v.npy", np.eye(3, dtype="float32"))
    arguments = ["search", "--documents", "v.npy", "--queries", "v.npy", "-k", 1]
    result = moe_fast_cli(*arguments, "-o", "r.run.gz")
    assert result.exit_code == 0, result.output
    assert result.output.count("v.npy: there are no ids beside it") == 2  # documents, queries
    hits = {query: list(hits) for query, hits in read_run("r.run.gz").items()}
    assert hits == {"0": ["0"], "1": ["1"], "2": ["2"]}  # equal numbers are no equal ids
    with gzip.open("r.run.gz", "rt") as file:
        assert file.readline().split()[:3] == ["0", "Q0", "0"]


def test_the_document_with_the_querys_id_is_left_out(moe_fast_cli, workspace):
    pairs = {"documents.npy": ["a", "b", "c"], "queries.npy": ["c", "x"]}
    vectors = {"documents.npy": np.eye(3), "queries.npy": np.array([[0, 0.5, 1], [0, 0.5, 1]])}
    for name, ids in pairs.items():
        np.save(name, vectors[name].astype("float32"))
        (workspace / f"{name}.ids.jsonl").write_text("".join(f'"{key}"\n' for key in ids))
    arguments = ["search", "--documents", "documents.npy", "--queries", "queries.npy", "-k", 2]
    result = moe_fast_cli(*arguments, "-o", "r")
    assert result.exit_code == 0 and "1 documents with their query's own id" in result.output
    assert {q: list(hits) for q, hits in read_run("r").items()} == {
        "c": ["b", "a"],
        "x": ["c", "b"],
    }
    kept = search(moe_fast_cli, *arguments[1:], "--keep-identical-ids", "-o", "run.trec")
    assert kept["c"] == ["c", "b"]


def test_ids_that_do_not_fit(moe_fast_cli, workspace):
    np.save("v.npy", np.eye(3, dtype="float32"))
    (workspace / "v.npy.ids.jsonl").write_text('"a"\n')
    result = moe_fast_cli("search", "--documents", "v.npy", "--save-index", "i")
    assert result.exit_code == 1 and "1 ids, but v.npy has 3 rows" in result.stderr


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


# --- three heads ---------------------------------------------------------------------------------


@pytest.fixture
def heads(workspace):
    """A mixture with three heads that differ from each other, in the folder ``heads``."""
    import torch

    model = add_three_heads(load_model("mixture", device="cpu"), multi_vector_dim=8)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.heads.sparse_linear.weight, std=0.1)
    torch.nn.init.constant_(model.heads.sparse_linear.bias, 0.5)
    model.save("heads")
    return load_three_heads("heads", device="cpu")


@pytest.mark.parametrize("by", ["sparse", "multi", "hybrid"])
def test_by_the_heads_outputs(by, heads, moe_fast_cli, workspace):
    documents, queries = rows("texts.jsonl"), rows("queries.jsonl")
    a, b = (
        heads.encode([row["text"] for row in part], outputs=OUTPUTS, domain="law")
        for part in (queries, documents)
    )
    weights = {"sparse": (0, 1, 0), "multi": (0, 0, 1), "hybrid": (1, 2, 0.5)}[by]
    expected = head_scores(a, b, weights).combined
    flags = ["--by", by, "--queries", "queries.jsonl", "-o", "run.trec", "-k", 5]
    if by == "hybrid":
        flags += ["--weights", "1,2,0.5", "--no-normalize"]
    model = ["--model", "heads", "--domain", "law"]
    found = search(moe_fast_cli, *model, "--documents", "texts.jsonl", *flags)
    run = read_run("run.trec")
    for q, query in enumerate(queries):
        order = np.argsort(-expected[q], kind="stable")[:5]
        best = {
            documents[i]["id"]: expected[q, i] for i in order if by != "sparse" or expected[q, i]
        }
        assert found[query["_id"]] == list(best)
        np.testing.assert_allclose(list(run[query["_id"]].values()), list(best.values()), rtol=1e-4)
    save = ["--documents", "texts.jsonl", "--by", by, "--save-index", "index", "--no-normalize"]
    search(moe_fast_cli, *model, *save)
    again = search(moe_fast_cli, *model, "--load-index", "index", *flags, "--overwrite")
    assert again == found


def test_a_heads_index_has_a_dense_one(heads, moe_fast_cli):
    queries = ["--queries", "queries.jsonl", "-o", "run.trec", "-k", 5, "--overwrite"]
    model = ["--model", "heads", "--domain", "law"]
    expected = search(moe_fast_cli, *model, "--documents", "texts.jsonl", *queries)
    save = ["--documents", "texts.jsonl", "--by", "hybrid", "--save-index", "index"]
    search(moe_fast_cli, *model, *save, "--pool-tokens", 2, "--rescore", 100, *queries)
    assert search(moe_fast_cli, *model, "--load-index", "index", *queries) == expected


def test_codes_and_a_second_scoring(moe_fast_cli, expected):
    queries = ["--queries", "queries.jsonl", "-o", "run.trec", "-k", 5, "--overwrite"]
    codes = ["--precision", "binary", "--rescore", 100]
    found = search(moe_fast_cli, *MODEL, "--documents", "texts.jsonl", *codes, *queries)
    assert found == {query: ids[:5] for query, ids in expected.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--by", "multi"], "--model must be given with --by multi"),
        (["--by", "sparse", "--rescore", "100"], "are not for --by sparse"),
        (["--candidates", "10"], "--candidates is for --by multi, hybrid; got dense"),
        (["--by", "multi", "--weights", "1,1,1"], "--weights is for --by hybrid; got multi"),
        (["--by", "hybrid", "--weights", "1,1"], "--weights must be three numbers"),
        (["--precision", "int8", "--index", "HNSW8"], "give --index or --precision"),
        (["--rescore", "7"], "--rescore must be at least -k 100"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, moe_fast_cli):
    files = ["--documents", "texts.jsonl", "--queries", "queries.jsonl", "-o", "r"]
    result = moe_fast_cli("search", *files, *flags)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_model_without_heads(moe_fast_cli):
    files = ["--documents", "texts.jsonl", "--save-index", "i", "--by", "sparse"]
    result = moe_fast_cli("search", *files, *MODEL)
    assert result.exit_code == 1 and "model 'mixture' has no heads" in result.stderr
