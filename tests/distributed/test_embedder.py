"""Embedder: a callable that is pickled, and adds the model's vectors to any kind of batch."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from moe_fast.distributed import Embedder, embedder
from moe_fast.inference import load_model
from tests.distributed.conftest import rows


@pytest.fixture
def expected(models):
    """The vectors of 12 rows by the model's own encode."""
    batch = rows(12)
    model = load_model(str(models / "moe"), device="cpu")
    return model.encode(batch["text"], domain=batch["domain"])


def arrays(count=12):
    return {name: np.array(values, object) for name, values in rows(count).items()}


def make(models, **options):
    return Embedder(str(models / "moe"), device="cpu", **{"domain": "domain", **options})


def test_a_copy_that_was_pickled_adds_the_models_vectors(models, expected):
    batch = arrays()
    original = make(models)
    assert len(pickle.dumps(original)) < 2_000, "settings alone, no model"
    found = pickle.loads(pickle.dumps(original))(batch)
    assert list(found) == ["id", "text", "domain", "embedding"] and list(batch) == list(rows(1))
    np.testing.assert_allclose(found["embedding"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [pa.Table, pa.RecordBatch])
def test_batches_of_arrow(kind, models, expected):
    batch = kind.from_pydict(rows(12))
    found = make(models, output_column="vector")(batch)
    assert isinstance(found, kind)
    size = expected.shape[1] if kind is pa.Table else -1  # Spark takes none of fixed size
    assert found.schema.field("vector").type == pa.list_(pa.float32(), size)
    np.testing.assert_allclose(found.column("vector").to_pylist(), expected, rtol=0, atol=1e-6)
    again = make(models, output_column="vector")(found)
    assert again.schema.names == found.schema.names, "the column is replaced"


def test_one_domain_for_all_texts(models):
    model = load_model(str(models / "moe"), device="cpu")
    found = make(models, domain="medicine")(arrays())["embedding"]
    np.testing.assert_allclose(
        found, model.encode(rows(12)["text"], domain="medicine"), rtol=0, atol=1e-6
    )


def test_one_model_per_process_for_all_copies(models, monkeypatch):
    loaded = []

    class Counted(embedder.TextEncoder):
        def __init__(self, settings):
            loaded.append(settings)
            super().__init__(settings)

    monkeypatch.setattr(embedder, "TextEncoder", Counted)
    monkeypatch.setattr(embedder, "_loaded", {})
    for _ in range(3):
        pickle.loads(pickle.dumps(make(models)))(arrays())
    assert len(loaded) == 1


@pytest.mark.parametrize("precision", ["binary", "ubinary", "float16"])
def test_precisions_without_ranges(precision, models, expected):
    found = make(models, precision=precision)(arrays())["embedding"]
    if precision == "float16":
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    else:
        np.testing.assert_array_equal(found, quantize_embeddings(expected, precision))


def test_whole_numbers_need_ranges(models, expected):
    ranges = np.stack([expected.min(0), expected.max(0)]) * 0.9  # some values are outside
    found = make(models, precision="int8", ranges=ranges)(arrays())["embedding"]
    difference = found.astype(int) - quantize_embeddings(expected, "int8", ranges)
    assert np.abs(difference).max() <= 1, "a vector's last bit may change the step"
    assert (difference == 0).mean() > 0.99
    with pytest.raises(ValueError, match="ranges must be given for precision='int8'"):
        make(models, precision="int8")
    with pytest.raises(ValueError, match="ranges must be None for precision='float32'"):
        make(models, ranges=ranges)
    with pytest.raises(ValueError, match=r"ranges must be \[2, 32\].*got \[2, 3\]"):
        make(models, precision="int8", ranges=ranges[:, :3])(arrays())


@pytest.mark.parametrize("batch_tokens", [1, 17, 10_000])
def test_batches_of_so_many_tokens(batch_tokens, models, monkeypatch):
    batch = arrays(40)
    batch["text"] = np.array([f"{text} " * (1 + i % 5) for i, text in enumerate(batch["text"])])
    model = load_model(str(models / "moe"), device="cpu")
    expected = model.encode(batch["text"].tolist(), domain=batch["domain"].tolist())
    seen, encode = [], embedder.TextEncoder.encode

    def count(self, texts, domains, tokens, batch_size):
        seen.append(sum(len(text.ids) for text in tokens))
        assert batch_size == len(texts) == len(tokens)
        return encode(self, texts, domains, tokens, batch_size)

    monkeypatch.setattr(embedder.TextEncoder, "encode", count)
    found = make(models, batch_tokens=batch_tokens)(batch)["embedding"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(seen) == {1: 40, 10_000: 1}.get(batch_tokens, len(seen))
    assert batch_tokens == 1 or max(seen) <= batch_tokens


def test_no_rows(models, expected):
    found = make(models)(arrays(0))["embedding"]
    assert found.shape == (0, expected.shape[1]) and found.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"text_column": "body"},
            "text_column='body' is no column of the batch; it has .*text",
        ),
        ({"text": ["w1", ""]}, {}, "row 1: text is empty"),
        ({"text": ["w1", None]}, {}, "row 1: text must be a string, got None"),
        ({"text": ["w1", "w1 " * 40]}, {}, "max_seq_length = 32"),
        ({"domain": ["law", "sport"]}, {}, "one of the model's .law, medicine.; got 'sport'"),
        ({}, {"domain": "topic"}, "one of the model's .law, medicine.; got 'topic'"),
        ({}, {"batch_tokens": 0}, "batch_tokens must be"),
        ({}, {"precision": "int4"}, "precision must be one of"),
    ],
)
def test_what_is_refused(changes, options, message, models):
    batch = {**arrays(2), **{name: np.array(v, object) for name, v in changes.items()}}
    with pytest.raises(ValueError, match=message):
        make(models, **options)(batch)
