"""A few thousand vectors in place of the million: all precisions, on the disk."""

import numpy as np
import pytest

pytest.importorskip("faiss")

from experiments.million_vectors import find_neighbours, make_vectors, run_parts

RNG = np.random.default_rng(0)


def unit(count: int) -> np.ndarray:
    rows = RNG.standard_normal((count, 32)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_neighbours_are_the_nearest_of_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.million_vectors.BLOCK", 64)
    make_vectors(unit(20), 200, tmp_path)
    queries = unit(5)
    find_neighbours(tmp_path, queries)
    vectors = np.load(tmp_path / "vectors.npy")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = (vectors[:20] * vectors[20:40]).sum(1)  # of two copies with noise
    assert 0.6 < cosines.mean() < 0.95
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    np.testing.assert_array_equal(np.load(tmp_path / "truth.npy"), expected)


@pytest.mark.slow
def test_the_precisions_on_the_disk(tmp_path):
    precisions = ["float32", "pq", "binary"]
    make_vectors(unit(200), 4000, tmp_path)
    find_neighbours(tmp_path, unit(20))
    both, results = ["build", "search"], tmp_path / "results.json"
    found = run_parts(both, precisions, tmp_path, results, {"vectors": 4000})
    assert found["float32"]["rescore 0"]["recall@10"] == 1
    sizes = [found[precision]["bytes per vector"] for precision in precisions]
    assert sizes == sorted(sizes, reverse=True)
    for precision in precisions[1:]:
        recalls = [found[precision][f"rescore {r}"]["recall@10"] for r in (0, 100, 1000)]
        assert recalls[0] <= recalls[1] + 0.05 and recalls[1] <= recalls[2] + 0.01
        assert recalls[2] >= (0.8 if precision == "binary" else 0.95)
        assert found[precision]["search peak MB"] < 4000
    assert run_parts(both, precisions, tmp_path, results, {}) == found  # nothing is run again
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()
