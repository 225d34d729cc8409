"""The index of three heads against scores computed by loops over the outputs."""

import numpy as np
import pytest
import scipy.sparse

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from moe_fast.data import TextRow
from moe_fast.encoding.head_outputs import HeadOutputs
from moe_fast.inference.codes import factory_of
from moe_fast.inference.head_build import build_head_index, pooled
from moe_fast.inference.head_index import load_head_index, search_heads

RNG = np.random.default_rng(0)
N, Q, DIM, TOKEN_DIM, VOCABULARY = 60, 7, 8, 4, 50
WEIGHTS = (1.0, 0.3, 0.5)


def outputs(number: int, least: int = 1) -> HeadOutputs:
    def unit(rows: int, dim: int) -> np.ndarray:
        values = RNG.standard_normal((rows, dim)).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    sparse = scipy.sparse.random(number, VOCABULARY, 0.1, "csr", np.float32, random_state=1)
    lengths = RNG.integers(least, 9, number)
    return HeadOutputs(unit(number, DIM), sparse, [unit(length, TOKEN_DIM) for length in lengths])


DOCUMENTS, QUERIES = outputs(N), outputs(Q)
ROWS = [TextRow(str(i), f"d{i}", None, f"line {i}") for i in range(N)]


def encode(rows, names):
    """The texts are the places of their outputs."""
    chosen = [int(row.text) for row in rows]
    every = {
        "dense": DOCUMENTS.dense[chosen],
        "sparse": DOCUMENTS.sparse[chosen],
        "multi_vector": [DOCUMENTS.multi_vector[i] for i in chosen],
    }
    return HeadOutputs(**{name: every[name] for name in names})


def build(folder, precision="float32", rows=ROWS, **options):
    folder.mkdir()

    def factory(dimension):
        return factory_of(precision, dimension)

    return build_head_index(
        rows, encode, folder, dense_factory=factory, token_factory=factory, **options
    )


def oracle():
    """{kind: scores [Q, N]}, by loops in float64."""
    found = {kind: np.zeros((Q, N)) for kind in ("dense", "sparse", "multi")}
    words = [outputs.sparse.toarray().astype(np.float64) for outputs in (QUERIES, DOCUMENTS)]
    for q in range(Q):
        for d in range(N):
            for i in range(DIM):
                found["dense"][q, d] += float(QUERIES.dense[q, i]) * float(DOCUMENTS.dense[d, i])
            found["sparse"][q, d] = (words[0][q] * words[1][d]).sum()
            best = [
                max(float(np.dot(vector.astype(np.float64), other)) for other in texts)
                for texts in [DOCUMENTS.multi_vector[d]]
                for vector in QUERIES.multi_vector[q]
            ]
            found["multi"][q, d] = sum(best) / len(best)
    parts = (found["dense"], found["sparse"], found["multi"])
    found["hybrid"] = sum(w * part for w, part in zip(WEIGHTS, parts, strict=True))
    return found


@pytest.mark.parametrize("by", ["sparse", "multi", "hybrid"])
def test_with_all_documents_as_candidates_the_search_is_exact(by, tmp_path):
    expected = oracle()[by]
    built = build(tmp_path / "index")
    for index in (built, load_head_index(tmp_path / "index")):
        assert index.ids == [row.id for row in ROWS]
        scores, rows = search_heads(index, QUERIES, 10, by=by, candidates=N, weights=WEIGHTS)
        order = np.argsort(-expected, axis=1, kind="stable")[:, :10]
        best = np.take_along_axis(expected, order, 1)
        if by == "sparse":  # documents without a shared word are not found
            order[best == 0] = -1
            best = np.where(best == 0, -np.inf, best)
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_allclose(scores, best, rtol=1e-5)


def test_candidates_are_the_best_of_either_search(tmp_path):
    exact = oracle()
    index = build(tmp_path / "index")
    _, rows = search_heads(index, QUERIES, 3, by="multi", candidates=3)
    for q in range(Q):
        proposed = {*np.argsort(-exact["dense"][q])[:3], *np.argsort(-exact["sparse"][q])[:3]}
        by_score = sorted(proposed, key=lambda d: -exact["multi"][q, d])
        assert rows[q].tolist() == by_score[:3]


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_token_codes_and_the_second_scoring(precision, tmp_path):
    exact = oracle()["multi"]
    index = build(tmp_path / "index", precision, rescore=True)
    scores, rows = search_heads(index, QUERIES, 5, by="multi", candidates=N)
    error = np.abs(scores - np.take_along_axis(exact, rows, 1)).max()
    assert error < {"float16": 2e-3, "int8": 2e-2, "binary": 0.5}[precision]
    scores, rows = search_heads(index, QUERIES, 5, by="multi", candidates=N, rescore=N)
    order = np.argsort(-exact, axis=1)[:, :5]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), atol=2e-3)


def test_pooled_tokens_are_fewer_unit_vectors(tmp_path):
    whole = build(tmp_path / "whole").tokens
    half = build(tmp_path / "half", pool_tokens=2).tokens
    lengths = np.diff(whole.starts)
    np.testing.assert_array_equal(np.diff(half.starts), np.maximum(lengths // 2, 1))
    vectors, _ = half.of(range(N))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    same = np.repeat(np.eye(4, dtype=np.float32)[:2], 3, axis=0)
    assert {tuple(row) for row in pooled(same, 3).round(5).tolist()} == {
        (1.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0),
    }


def test_an_inverted_index_alone(tmp_path):
    index = build(tmp_path / "index", parts="sparse")
    assert index.tokens is None
    with pytest.raises(ValueError, match="built for sparse search alone"):
        search_heads(index, QUERIES, 3, by="hybrid")
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"heads.json", "sparse.npz"}


def test_bad_arguments_and_folders(tmp_path):
    index = build(tmp_path / "index")
    for options, message in (
        ({"by": "dense"}, "by must be one of"),
        ({"candidates": 2}, "candidates must be at least k = 3; got 2"),
        ({"weights": (0, 0, 0)}, "weights must be three finite numbers"),
        ({"rescore": 5}, "this index has not kept"),
    ):
        with pytest.raises(ValueError, match=message):
            search_heads(index, QUERIES, 3, **options)
    with pytest.raises(ValueError, match="line 3: id 'd3' was given before"):
        build(tmp_path / "twice", rows=[*ROWS[:4], ROWS[3]])
    with pytest.raises(FileNotFoundError, match=r"no file heads\.json"):
        load_head_index(tmp_path)
    codes = tmp_path / "index" / "tokens.codes"
    codes.write_bytes(codes.read_bytes()[:-16])
    with pytest.raises(ValueError, match="do not belong together"):
        load_head_index(tmp_path / "index")
