"""What ``embed`` writes is loaded by faiss, LanceDB and Qdrant, and found there as by NumPy."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_fast.inference import EncoderSettings, embed_file, load_model
from tests.encoding.conftest import models

__all__ = ["models"]
TEXTS = [f"w{i % 50} w{(7 * i) % 50} w{i % 11}" for i in range(60)]
pytestmark = pytest.mark.slow


@pytest.fixture
def stored(models, tmp_path):
    """Embeds the texts with a precision, and returns (Arrow table, array of what is stored)."""

    def embed(precision):
        source = tmp_path / "texts.jsonl"
        rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = EncoderSettings(str(models / "moe"), domain="law", normalize=True, device="cpu")
        output = tmp_path / f"{precision}.parquet"
        embed_file(source, output, settings, precision=precision, progress=False)
        table = pq.read_table(output)
        flat = table["embedding"].combine_chunks().flatten().to_numpy()
        return table, flat.reshape(len(TEXTS), -1)

    return embed


@pytest.fixture
def vectors(models):
    model = load_model(str(models / "moe"), device="cpu")
    return model.encode(TEXTS, domain="law", normalize_embeddings=True)


def test_faiss(stored, vectors):
    faiss = pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")
    _, bits = stored("ubinary")
    index = faiss.IndexBinaryFlat(vectors.shape[1])
    index.add(bits)
    distances, _ = index.search(bits[:5], 60)
    signs = vectors > 0
    expected = (signs[:5, None] != signs[None]).sum(-1)
    np.testing.assert_array_equal(distances, np.sort(expected, axis=1))
    _, bytes_ = stored("uint8")
    index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_8bit_direct)
    index.train(bytes_.astype(np.float32))
    index.add(bytes_.astype(np.float32))
    np.testing.assert_array_equal(index.reconstruct_n(0, 60), bytes_)


def test_lancedb(stored, vectors, tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="needs the extra moe-fast[stores]")
    database = lancedb.connect(tmp_path / "lancedb")
    for precision, distance in (
        ("float32", "cosine"),
        ("float16", "cosine"),
        ("ubinary", "hamming"),
    ):
        table, array = stored(precision)
        loaded = database.create_table(precision, table)
        search = loaded.search(array[3], vector_column_name="embedding").distance_type(distance)
        assert search.limit(1).to_list()[0]["id"] in {
            f"d{i}" for i in np.flatnonzero((array == array[3]).all(1))
        }


def test_qdrant(stored, vectors):
    qdrant = pytest.importorskip("qdrant_client", reason="make test-stores installs it")
    client = qdrant.QdrantClient(":memory:")
    names = qdrant.models.Datatype
    for precision, datatype in (("float32", names.FLOAT32), ("uint8", names.UINT8)):
        table, array = stored(precision)
        size, distance = array.shape[1], qdrant.models.Distance.EUCLID
        params = qdrant.models.VectorParams(size=size, distance=distance, datatype=datatype)
        client.create_collection(precision, vectors_config=params)
        payload = [{"id": key} for key in table["id"].to_pylist()]
        client.upload_collection(precision, array, payload=payload, ids=range(len(array)))
        found = client.query_points(precision, query=array[3].tolist(), limit=5).points
        distances = np.linalg.norm(array.astype(np.float64) - array[3], axis=1)
        np.testing.assert_allclose([p.score for p in found], np.sort(distances)[:5], atol=1e-4)
        assert [p.payload["id"] for p in found] == [f"d{p.id}" for p in found]
