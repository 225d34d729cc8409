"""bench.runtimes: the dense model embeds the same in other runtimes, as far as precision allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

from sentence_transformers import SentenceTransformer

from bench.runtimes import FORMS, Exports, encoder
from tests.models.tiny import save_sentence_transformer

LEAST_COSINE = {"float32": 0.999999, "bfloat16": 0.999, "int8": 0.95}
EVERY = [(precision, form) for precision, forms in FORMS.items() for form in forms]


def texts(start: int, count: int) -> list[str]:
    """Texts of one to thirty words; the model cuts them to 32 tokens."""
    return [
        " ".join(f"w{(7 * i + j * j) % 54}" for j in range(1 + (5 * i) % 37))
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtimes")
    model = SentenceTransformer(save_sentence_transformer(folder), device="cpu")
    return Exports(model, texts(100, 16), folder / "files")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "form"), EVERY, ids=[f"{form.who}, {precision}" for precision, form in EVERY]
)
@pytest.mark.parametrize("streams", [1, 2])
def test_it_embeds_like_the_dense_model(exports, precision, form, streams):
    reason = form.missing()
    if reason:
        pytest.skip(reason)
    found = encoder(exports, form.load(exports, 2, streams), batch_size=4)(texts(0, 23))
    exact = exports.model.encode(texts(0, 23), convert_to_tensor=True)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    cosines = torch.cosine_similarity(found, exact)
    assert cosines.min() > LEAST_COSINE[precision], cosines
    attention = exports.model.transformers_model.config._attn_implementation
    assert attention == "sdpa", "exporting changed the model"


def test_files_are_made_once_and_for_their_calibration(exports):
    calls = []

    def make(path):
        calls.append(path)
        path.write_text("made")

    first = exports.file("x.txt", make)
    assert exports.file("x.txt", make) == first and first.read_text() == "made"
    assert len(calls) == 1 and not calls[0].exists()
    other = Exports(exports.model, texts(0, 1), exports.folder.parent)
    assert other.file("x.txt", make) != first and len(calls) == 2


def test_a_file_that_fails_is_not_there(exports):
    def fails(path):
        path.write_text("half")
        raise RuntimeError("the exporter failed")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="the exporter failed"):
            exports.file("y.txt", fails)
    assert not (exports.folder / "y.txt").exists()


def test_what_is_missing_is_named():
    form = replace(FORMS["int8"][-1], needs=("torch", "no_such_package"))
    assert form.missing() == "no_such_package not installed (extra bench-peers)"
    assert replace(form, needs=("torch",)).missing() is None


def test_batches_are_sorted_and_vectors_are_not(exports):
    seen = []

    def embed(batches):
        found = []
        for batch in batches:
            seen.append(batch["input_ids"].shape)
            found.append(batch["attention_mask"].sum(1, keepdims=True).astype("float32"))
        return found

    given = ["w1 w2 w3", "w1", "w1 w2 w3 w4 w5", "w1 w2"]
    vectors = encoder(exports, embed, batch_size=2)(given)
    assert vectors.flatten().tolist() == [5, 3, 7, 4]  # with [CLS] and [SEP]
    assert seen == [(2, 7), (2, 4)]
