"""The table of search by three heads, on random outputs in place of a model's."""

import pytest

pytest.importorskip("faiss")
pytest.importorskip("ir_measures")

from experiments import search_quality
from experiments.three_heads import Questions
from tests.inference.test_head_index import DOCUMENTS, N

QUERIES = list(range(0, N, 10))


def test_a_documents_own_outputs_find_it(monkeypatch):
    monkeypatch.setattr(search_quality, "PRECISIONS", ("float32", "binary"))
    monkeypatch.setattr(search_quality, "POOLING", (1, 2))
    rows = [search_quality.TextRow(str(i), str(i), None, "") for i in QUERIES]
    names = ("dense", "sparse", "multi_vector")
    queries = search_quality.rows_of(DOCUMENTS, rows, names)
    found = search_quality.measure(queries, DOCUMENTS, QUERIES)
    by = {(r["by"], r["precision"], r["pooling"], r["rescore"]): r for r in found}
    assert len(by) == len(found) == 16
    assert by["dense", "float32", 1, 0]["nDCG@10"] == by["multi", "float32", 1, 0]["nDCG@10"] == 1
    assert by["multi", "binary", 1, 20]["nDCG@10"] >= by["multi", "binary", 1, 0]["nDCG@10"]
    assert by["dense", "float32", 1, 0]["bytes"] == 32 == 32 * by["dense", "binary", 1, 0]["bytes"]
    sizes = [by["multi", "float32", pooling, 0]["bytes"] for pooling in (1, 2)]
    assert sizes[0] > sizes[1] > by["dense", "float32", 1, 0]["bytes"]
    text = search_quality.table("X", Questions(["q"], ["d"], [0]), found)
    assert (
        text.startswith("## X: 1 questions, 1 documents") and "| multi | binary | 2 | 20 |" in text
    )
