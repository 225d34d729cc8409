"""OnnxEncoder: encode as sentence-transformers has it, and damaged folders."""

import inspect
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("onnx", reason="needs the extra moe-fast[onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra moe-fast[onnx]")

from sentence_transformers import SentenceTransformer

import moe_fast
from moe_fast import OnnxEncoder
from tests.models.tiny import save_sentence_transformer

TEXTS = ["w1 w2 w3", "w50", "", "w7 " * 25, "w9 w8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model's export beside the model: ``out`` and ``model``."""
    folder = tmp_path_factory.mktemp("onnx")
    moe_fast.export_onnx(save_sentence_transformer(folder), folder / "out")
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    return OnnxEncoder(folder / "out")


@pytest.fixture(scope="module")
def model(folder):
    return SentenceTransformer(str(folder / "model"), device="cpu")


def test_the_signature_is_that_of_sentence_transformers():
    theirs = inspect.signature(SentenceTransformer.encode).parameters
    ours = inspect.signature(OnnxEncoder.encode).parameters
    assert list(ours)[: len(theirs) - 1] == list(theirs)[:-1]  # the last are its **kwargs
    assert {n: ours[n].default for n in ours if n in theirs} == {
        n: p.default for n, p in theirs.items() if n != "kwargs"
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_name": "query"},
        {"prompt": "w5 "},
        {"truncate_dim": 8},
        {"normalize_embeddings": True},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"batch_size": 1},
        {"show_progress_bar": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
    ],
)
def test_options_are_those_of_sentence_transformers(options, exported, model):
    for given in (TEXTS, "w3 w4"):
        found, expected = exported.encode(given, **options), model.encode(given, **options)
        assert type(found) is type(expected)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions(precision, exported, model):
    found = exported.encode(TEXTS, precision=precision)
    expected = model.encode(TEXTS, precision=precision)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found != expected).mean() < 0.05  # values at a border are rounded either way


def test_roles_choose_the_prompts(exported, model):
    for name in ("encode_query", "encode_document"):
        found, expected = getattr(exported, name)(TEXTS), getattr(model, name)(TEXTS)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    query = exported.encode(TEXTS, prompt_name="query")
    np.testing.assert_array_equal(exported.encode_query(TEXTS), query)
    chosen = exported.encode_query(TEXTS, prompt_name="document")
    np.testing.assert_array_equal(chosen, exported.encode_document(TEXTS))


def test_no_texts_give_no_vectors(exported):
    assert exported.encode([]).shape == (0, 32)
    assert exported.encode([], convert_to_tensor=True).shape == (0, 32)


def test_long_texts_are_errors_or_cut(exported, folder, model):
    long = ["w1", "w3 " * 50]
    with pytest.raises(ValueError, match="text 1 has 52"):
        exported.encode(long)
    expected = model.encode(long)  # the stock class cuts unasked
    np.testing.assert_allclose(exported.encode(long, truncate=True), expected, atol=1e-5)
    cutting = OnnxEncoder(folder / "out", truncate=True, threads=1)
    np.testing.assert_allclose(cutting.encode(long), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_name": "q"}, ValueError, "document, query"),
        ({"output_value": "token_embeddings"}, ValueError, "output_value"),
        ({"precision": "float16"}, ValueError, "precision"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"truncate_dim": 0}, ValueError, "truncate_dim"),
        ({"device": "cuda"}, ValueError, "device must be None"),
        ({"pool": {}}, ValueError, "pool must be None"),
        ({"domain": "law"}, ValueError, "the model has no domains"),
        ({"domain": "auto"}, ValueError, "no domain predictor"),
        ({"domain": 3}, TypeError, "domain must be a name"),
        ({"inputs": ["a", 1]}, TypeError, "got int"),
    ],
)
def test_wrong_arguments_are_named(options, error, message, exported):
    with pytest.raises(error, match=message):
        exported.encode(**{"inputs": TEXTS, **options})


def test_threads_share_an_encoder(exported):
    expected = [exported.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(exported.encode, TEXTS * 10))
    np.testing.assert_allclose(found, expected * 10, atol=1e-6)


def test_the_model_is_evaluated_like_any(exported):
    from moe_fast.encoding.vectors import encode_texts

    np.testing.assert_array_equal(encode_texts(exported, TEXTS), exported.encode(TEXTS))


def damage(folder, to, change):
    shutil.copytree(folder / "out", to)
    change(to)
    return to


def rewrite(folder, **changes):
    path = folder / "onnx_encoder.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({n: v for n, v in content.items() if v is not ...}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "model.onnx").unlink(), FileNotFoundError, "has no model.onnx"),
        (lambda f: (f / "onnx_encoder.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: rewrite(f, format=2), ValueError, "must have format 1"),
        (lambda f: rewrite(f, prompts=...), ValueError, "missing or unknown are prompts"),
        (lambda f: rewrite(f, inputs=["x"]), ValueError, "must have the inputs"),
    ],
)
def test_damaged_folders_are_refused(change, error, message, folder, tmp_path):
    with pytest.raises(error, match=message):
        OnnxEncoder(damage(folder, tmp_path / "damaged", change))


def test_a_missing_runtime_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnx"):
        OnnxEncoder(folder / "out")


def test_tensors_are_their_own(exported):
    tensor = exported.encode("w1", convert_to_tensor=True)
    assert tensor.is_contiguous() and tensor.dtype == torch.float32
