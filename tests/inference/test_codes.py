"""Indexes that keep vectors in fewer bytes, and the hits scored again by the vectors themselves."""

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from moe_fast.inference import build_index, load_index, open_vectors, save_index, search_index
from moe_fast.inference.codes import PRECISIONS, factory_of
from moe_fast.inference.vectors import write_vectors

RNG = np.random.default_rng(0)
DOCUMENTS = RNG.standard_normal((600, 16)).astype(np.float32)
QUERIES = RNG.standard_normal((20, 16)).astype(np.float32)
BYTES = {"float32": 64, "float16": 32, "int8": 16, "pq": 4, "binary": 2}
UNIT = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (QUERIES, DOCUMENTS)]
EXACT = UNIT[0].astype(np.float64) @ UNIT[1].T.astype(np.float64)


@pytest.fixture
def documents(tmp_path):
    write_vectors(tmp_path / "d.npy", [([f"d{i}" for i in range(600)], DOCUMENTS)], (600, 16))
    return open_vectors(tmp_path / "d.npy")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_codes_and_the_second_scoring(precision, documents, tmp_path):
    factory = factory_of(precision, 16)
    built = build_index(documents, factory=factory, keep_vectors=tmp_path / "kept")
    assert built.index.sa_code_size() == BYTES[precision]
    save_index(built, tmp_path / "index")
    index = load_index(tmp_path / "index")
    best = np.argsort(-EXACT, axis=1)[:, :5]
    scores, rows = search_index(index, QUERIES, 5)
    assert (np.diff(scores, axis=1) <= 0).all() and (scores <= 1.01).all()
    found = np.mean([len(set(a) & set(b)) for a, b in zip(rows, best, strict=True)]) / 5
    assert (
        found >= {"float32": 1, "float16": 0.95, "int8": 0.9, "pq": 0.4, "binary": 0.1}[precision]
    )
    scores, rows = search_index(index, QUERIES, 5, rescore=600)  # all are scored again: exact
    np.testing.assert_array_equal(rows, best)
    np.testing.assert_allclose(scores, -np.sort(-EXACT, axis=1)[:, :5], rtol=1e-5)


def test_bits_count_equal_signs(documents):
    scores, rows = search_index(build_index(documents, factory="LSH"), QUERIES, 3)
    signs = np.sign(QUERIES) @ np.sign(DOCUMENTS).T / 16
    np.testing.assert_allclose(scores, np.take_along_axis(signs, rows, 1), rtol=1e-6)
    np.testing.assert_allclose(scores, -np.sort(-signs, axis=1)[:, :3], rtol=1e-6)


def test_the_parts_of_a_product_quantisation():
    assert [factory_of("pq", d) for d in (384, 10, 7, 2)] == [
        *("PQ96x8np", "PQ2x8np", "PQ1x8np", "PQ1x8np")
    ]
    with pytest.raises(ValueError, match="precision must be one of"):
        factory_of("int4", 8)


def test_what_cannot_be_scored_again_or_learned(documents, tmp_path):
    index = build_index(documents)
    with pytest.raises(ValueError, match="this index has not kept"):
        search_index(index, QUERIES, 5, rescore=10)
    kept = build_index(documents, keep_vectors=tmp_path / "kept")
    with pytest.raises(ValueError, match="rescore must be at least k = 5, or 0; got 4"):
        search_index(kept, QUERIES, 5, rescore=4)
    write_vectors(tmp_path / "few.npy", [(["a", "b"], DOCUMENTS[:2])], (2, 16))
    with pytest.raises(ValueError, match="learns 256 points from the vectors, and needs as many"):
        build_index(open_vectors(tmp_path / "few.npy"), factory="PQ4x8")


def test_kept_vectors_of_another_index(documents, tmp_path):
    save_index(build_index(documents, keep_vectors=tmp_path / "kept"), tmp_path / "index")
    kept = tmp_path / "index" / "vectors.f32"
    kept.write_bytes(kept.read_bytes()[:-64])
    with pytest.raises(ValueError, match=r"600 vectors, but 599 in vectors\.f32"):
        load_index(tmp_path / "index")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes are no rows of 64 bytes"):
        load_index(tmp_path / "index")
