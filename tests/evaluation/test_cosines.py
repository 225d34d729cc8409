from __future__ import annotations

import numpy as np

from moe_fast.evaluation import EncodeOptions, TfidfEncoder, embed
from moe_fast.evaluation.cosines import all_cosines, embed_pairs, pairwise_cosine
from tests.evaluation.fakes import TableEncoder


def test_pairs_are_queries_and_documents_with_their_domains() -> None:
    model = TableEncoder()
    columns = {"a": ["x", "y"], "b": ["u", "v"], "domain": ["f", "g"]}
    options = EncodeOptions(pass_domain=True, query_prompt="Q: ")
    a, b, settings = embed_pairs(model, columns, options)
    assert model.calls == [
        {"texts": ["x", "y"], "domain": ["f", "g"], "prompt": "Q: "},
        {"texts": ["u", "v"], "domain": ["f", "g"]},
    ]
    assert settings["encode"]["pass_domain"] is True
    expected = [[model.cosine(p, q) for q in "uv"] for p in "xy"]
    np.testing.assert_allclose(all_cosines(a, b), expected)
    np.testing.assert_allclose(pairwise_cosine(a, b), np.diag(expected))


def test_sparse_cosines_are_the_dense_ones() -> None:
    texts = ["one two", "two three three", "four", "one four"]
    model = TfidfEncoder(texts)
    a, b = embed(model, texts[:2], "query"), embed(model, texts[2:], "document")
    np.testing.assert_allclose(all_cosines(a, b), a.toarray() @ b.toarray().T)
    np.testing.assert_allclose(pairwise_cosine(a, b), np.diag(a.toarray() @ b.toarray().T))


def test_equal_vectors_have_equal_cosines() -> None:
    vector = np.random.default_rng(0).normal(size=37)
    same = np.tile(vector / np.linalg.norm(vector), (301, 1))
    assert set(all_cosines(same, same).ravel()) | set(pairwise_cosine(same, same)) == {1.0}
