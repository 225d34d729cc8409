"""Vectors in fewer bytes: as sentence-transformers quantises them, and read back as numbers."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from moe_fast.inference import EncoderSettings, build_index, embed_file, load_model, open_vectors
from moe_fast.inference.precision import StoredPrecision, from_metadata, ranges_of
from moe_fast.inference.vectors import write_vectors
from tests.distributed.conftest import rows

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((300, 21)).astype(np.float32)  # 21 is no multiple of 8
QUANTISED = ["int8", "uint8", "binary", "ubinary"]


def stored(precision, vectors=VECTORS):
    ranges = ranges_of([vectors]) if precision.endswith("int8") else None
    return StoredPrecision(precision, vectors.shape[1], ranges)


def write(path, precision, vectors=VECTORS):
    pieces = [(["a"] * 100, vectors[:100]), (["b"] * 200, vectors[100:])]
    write_vectors(path, iter(pieces), vectors.shape, stored(precision, vectors))


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_file_holds_what_sentence_transformers_computes(precision, tmp_path):
    write(tmp_path / "v.parquet", precision)
    table = pq.read_table(tmp_path / "v.parquet")
    expected = quantize_embeddings(VECTORS, precision)
    found = np.array(table["embedding"].to_pylist(), expected.dtype)
    np.testing.assert_array_equal(found, expected)
    kind = table.schema.field("embedding").type
    assert kind == pa.list_(pa.from_numpy_dtype(expected.dtype), expected.shape[1])
    content = json.loads(table.schema.metadata[b"moe_fast"])
    assert (content["precision"], content["dimension"]) == (precision, 21)
    if "ranges" in content:
        np.testing.assert_array_equal(
            np.array(content["ranges"], np.float32), [VECTORS.min(0), VECTORS.max(0)]
        )


@pytest.mark.parametrize("precision", QUANTISED)
def test_it_is_read_as_numbers(precision, tmp_path):
    write(tmp_path / "v.parquet", precision)
    opened = open_vectors(tmp_path / "v.parquet")
    found = np.concatenate([vectors for _, vectors in opened.pieces()])
    assert (opened.rows, opened.dimension, found.dtype) == (300, 21, np.float32)
    if precision.endswith("binary"):
        np.testing.assert_array_equal(found, np.where(VECTORS > 0, 1, -1))
    else:
        step = (VECTORS.max(0) - VECTORS.min(0)) / 255
        assert (np.abs(found - VECTORS) <= 0.501 * step).mean() > 0.99, "the centre of a step"
        assert (np.abs(found - VECTORS) <= 1.01 * step).all()


def test_a_dimension_without_range_and_values_outside():
    constant = StoredPrecision("int8", 2, np.array([[1, -1], [1, 1]], np.float32))
    encoded = constant.encode(np.array([[1, -5], [1, 5]], np.float32))
    assert encoded.tolist() == [[-128, -128], [-128, 127]]
    assert constant.decode(encoded)[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", 2), "precision must be one of"),
        (("int8", 2), r"ranges must be \[2, 2\].*got None"),
        (("int8", 2, np.zeros((2, 3), np.float32)), r"got \[2, 3\]"),
        (("uint8", 1, np.array([[1], [0]], np.float32)), "finite, with"),
        (("uint8", 1, np.array([[0], [np.nan]], np.float32)), "finite, with"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StoredPrecision(*arguments)


def test_numbers_that_float16_cannot_hold():
    with pytest.raises(ValueError, match="a number is too large for it"):
        StoredPrecision("float16", 1).encode(np.array([[1e6]], np.float32))


def test_damaged_metadata_and_another_column_are_named(tmp_path):
    assert from_metadata(None) is None and from_metadata({b"other": b"x"}) is None
    path = tmp_path / "v.parquet"
    for entry in ("{", "[]", '{"precision": "int8", "dimension": 2}', '{"precision": 1}'):
        with pytest.raises(ValueError, match="the entry 'moe_fast' of the metadata is damaged"):
            from_metadata({b"moe_fast": entry.encode()})
    lists = pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))
    metadata = stored("ubinary").metadata()
    pq.write_table(pa.table({"embedding": lists}, metadata=metadata), path)
    with pytest.raises(ValueError, match=r"3 numbers of type uint8 \(precision ubinary\).*float"):
        open_vectors(path)


def source(tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table(rows(60)), path)
    return path


@pytest.mark.parametrize("precision", ["float32", "float16", *QUANTISED])
def test_embed_file(precision, models, tmp_path):
    settings = EncoderSettings(str(models / "moe"), device="cpu")
    options = {"domain_column": "domain", "chunk_size": 16, "progress": False}
    output = tmp_path / "v.parquet"
    embed_file(source(tmp_path), output, settings, precision=precision, **options)
    model = load_model(str(models / "moe"), device="cpu")
    vectors = model.encode(rows(60)["text"], domain=rows(60)["domain"])
    found = np.array(pq.read_table(output)["embedding"].to_pylist())
    if precision.startswith("float"):
        np.testing.assert_allclose(found, vectors, rtol=0, atol=1e-3)
    else:
        expected = quantize_embeddings(vectors, precision).astype(int)
        assert (found == expected).mean() > 0.98, "but for the last bit of a vector"
    assert build_index(open_vectors(output)).ids == rows(60)["id"], "search takes it"


def test_killed_before_the_clean_up_of_quantised_vectors(models, tmp_path, monkeypatch):
    from moe_fast.inference import parts

    def die(folder):
        raise KeyboardInterrupt

    settings = EncoderSettings(str(models / "moe"), device="cpu")
    options = {"domain_column": "domain", "precision": "int8", "progress": False}
    output = tmp_path / "v.parquet"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts.Parts, "remove", die)
        embed_file(source(tmp_path), output, settings, **options)
    content = output.read_bytes()
    assert embed_file(source(tmp_path), output, settings, **options).resumed_rows == 60
    assert output.read_bytes() == content


def test_what_embed_file_refuses(models, tmp_path):
    path, settings = source(tmp_path), EncoderSettings(str(models / "moe"), domain="law")
    with pytest.raises(ValueError, match="precision='int8' needs a .parquet file"):
        embed_file(path, tmp_path / "v.npy", settings, precision="int8")
    with pytest.raises(ValueError, match="precision must be one of"):
        embed_file(path, tmp_path / "v.parquet", settings, precision="int4")
    half = EncoderSettings(str(models / "moe"), domain="law", dtype="float16")
    with pytest.raises(ValueError, match="give dtype or precision; got dtype='float16' and"):
        embed_file(path, tmp_path / "v.parquet", half, precision="int8")
    assert not list(tmp_path.glob("v.*"))


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name, part in (("b", VECTORS[100:]), ("a", VECTORS[:100])):
        ids = [f"{name}{i}" for i in range(len(part))]
        write_vectors(tmp_path / f"{name}.parquet", [(ids, part)], part.shape)
    opened = open_vectors(tmp_path)
    pieces = list(opened.pieces())
    np.testing.assert_array_equal(np.concatenate([v for _, v in pieces]), VECTORS)
    assert (opened.rows, opened.dimension, opened.has_ids) == (300, 21, True)
    assert [key for keys, _ in pieces for key in keys][99:101] == ["a99", "b0"]


def test_a_folder_without_ids_counts_on(tmp_path):
    for name in "ab":
        lists = pa.array([[1.0], [2.0]], pa.list_(pa.float32()))
        pq.write_table(pa.table({"embedding": lists}), tmp_path / f"{name}.parquet")
    ids = [key for keys, _ in open_vectors(tmp_path).pieces() for key in keys]
    assert ids == ["0", "1", "2", "3"]


def test_a_folder_of_different_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no file \*\.parquet"):
        open_vectors(tmp_path)
    write_vectors(tmp_path / "a.parquet", [(["x"], VECTORS[:1])], (1, 21))
    write_vectors(tmp_path / "b.parquet", [(["y"], VECTORS[:1, :4])], (1, 4))
    with pytest.raises(ValueError, match=r"b\.parquet: dimension 4.*a\.parquet: dimension 21"):
        open_vectors(tmp_path)
