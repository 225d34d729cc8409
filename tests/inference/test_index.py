"""The faiss index: exact hits as NumPy finds them, saved whole, refused where broken."""

import json

import numpy as np
import pytest

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from moe_fast.inference import build_index, load_index, open_vectors, save_index, search_index
from moe_fast.inference.vectors import write_vectors

RNG = np.random.default_rng(0)
DOCUMENTS = RNG.standard_normal((500, 8)).astype(np.float32)
QUERIES = RNG.standard_normal((20, 8)).astype(np.float32)


@pytest.fixture
def documents(tmp_path):
    pieces = (
        ([f"d{i}" for i in range(s, s + 50)], DOCUMENTS[s : s + 50]) for s in range(0, 500, 50)
    )
    write_vectors(tmp_path / "documents.parquet", pieces, DOCUMENTS.shape)
    return open_vectors(tmp_path / "documents.parquet")


def exact(normalize):
    a, b = QUERIES.astype(np.float64), DOCUMENTS.astype(np.float64)
    if normalize:
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


@pytest.mark.parametrize("normalize", [True, False])
def test_the_default_is_exact(normalize, documents):
    index = build_index(documents, normalize=normalize)
    scores, rows = search_index(index, QUERIES, 10)
    expected = exact(normalize)
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :10], rtol=1e-5)
    assert index.ids == [f"d{i}" for i in range(500)]


def test_what_is_searched_stays_as_it_is(documents):
    before = QUERIES.copy()
    search_index(build_index(documents), QUERIES, 3)
    np.testing.assert_array_equal(QUERIES, before)


def test_other_indexes_by_faiss_factory(documents):
    index = build_index(documents, factory="IVF4,Flat", train_rows=300)
    index.index.nprobe = 4  # all cells: exact again
    _, rows = search_index(index, QUERIES, 5)
    np.testing.assert_array_equal(rows, np.argsort(-exact(True), axis=1)[:, :5])


def test_the_training_sample_is_spread_over_the_file(documents):
    from moe_fast.inference.index import _sample

    np.testing.assert_array_equal(_sample(documents, 100, normalize=False), DOCUMENTS[::5])
    np.testing.assert_array_equal(_sample(documents, 300, normalize=False), DOCUMENTS[::2])


def test_fewer_documents_than_hits(documents):
    _, rows = search_index(build_index(documents), QUERIES, 10_000)
    assert rows.shape == (20, 500)


def test_saved_and_loaded(documents, tmp_path):
    index = build_index(documents)
    save_index(index, tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert (loaded.ids, loaded.normalize, loaded.factory) == (index.ids, True, "Flat")
    for one, other in zip(
        search_index(index, QUERIES, 5), search_index(loaded, QUERIES, 5), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_bad_arguments(documents, tmp_path):
    index = build_index(documents)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 8\].*; got \[20, 7\]"):
        search_index(index, QUERIES[:, :7], 5)
    with pytest.raises(ValueError, match="k must be .*got 0"):
        search_index(index, QUERIES, 0)
    with pytest.raises(ValueError, match="index='Nothing7': faiss cannot build it"):
        build_index(documents, factory="Nothing7")
    with pytest.raises(ValueError, match="faiss cannot build it"):
        build_index(documents, factory="IVF4096,Flat")


def test_duplicate_ids(tmp_path):
    write_vectors(tmp_path / "v.parquet", [(["a", "b", "a"], DOCUMENTS[:3])], (3, 8))
    with pytest.raises(ValueError, match="id 'a' is there twice, in rows 0 and 2"):
        build_index(open_vectors(tmp_path / "v.parquet"))


def test_no_documents(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((0, 8), np.float32))
    with pytest.raises(ValueError, match="no vectors"):
        build_index(open_vectors(tmp_path / "v.npy"))


def test_broken_indexes(documents, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file index.faiss in it"):
        load_index(tmp_path)
    save_index(build_index(documents), tmp_path / "index")
    content = tmp_path / "index" / "content.json"
    whole = content.read_text()
    content.write_text(whole[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        load_index(tmp_path / "index")
    content.write_text(json.dumps(json.loads(whole) | {"ids": ["x"]}))
    with pytest.raises(ValueError, match="500 vectors, but 1 ids"):
        load_index(tmp_path / "index")
    content.write_text(whole)
    (tmp_path / "index" / "index.faiss").write_bytes(b"IxFI")
    with pytest.raises(ValueError, match="cannot be read"):
        load_index(tmp_path / "index")
