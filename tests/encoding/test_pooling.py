"""set_pooling: the vectors are those of the tokens that the pooling names, packed or not."""

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from moe_fast.encoding.pooling import POOLINGS, set_pooling
from tests.training.tiny_models import make_dense, make_moe

TEXTS = ["apple pear", "iron zinc tin gold lead", "nile"]


def expected(model, pooling, **options):
    """Of each text alone: no padding, and one vector per token."""
    rows = []
    for text in TEXTS:
        tokens = model.encode([text], output_value="token_embeddings", **options)[0]
        found = {"cls": tokens[0], "mean": tokens.mean(0), "last": tokens[-1]}[pooling]
        rows.append(torch.as_tensor(found).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["dense", "packed", "padded"])
def test_the_vectors(pooling, kind, tmp_path):
    model = make_dense() if kind == "dense" else make_moe()
    options = {} if kind == "dense" else {"domain": "fruit", "packed": False}
    rows = expected(model, pooling, **options)
    set_pooling(model, pooling)
    if kind == "packed":
        options["packed"] = True
    np.testing.assert_allclose(model.encode(TEXTS, **options), rows, rtol=1e-4, atol=1e-5)
    if kind == "dense":
        model.save_pretrained(str(tmp_path))
        again = SentenceTransformer(str(tmp_path), device="cpu")
        np.testing.assert_allclose(again.encode(TEXTS), rows, rtol=1e-4, atol=1e-5)


def test_models_whose_pooling_cannot_be_set():
    model = make_dense()
    with pytest.raises(ValueError, match="pooling must be one of"):
        set_pooling(model, "max")
    two = SentenceTransformer(modules=[model[0], Pooling(16, ("mean", "max"))], device="cpu")
    with pytest.raises(ValueError, match="vectors of 16 numbers, where .* makes 32"):
        set_pooling(two, "cls")
    none = SentenceTransformer(modules=[model[0]], device="cpu")
    with pytest.raises(TypeError, match="one Pooling module; it has 0"):
        set_pooling(none, "cls")
