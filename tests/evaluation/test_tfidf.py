from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from moe_fast.evaluation import TfidfEncoder

TEXTS = ["a stent keeps an artery open", "a tort is a civil wrong", "an artery is a vessel vessel"]


def test_the_vectors_are_scikit_learns() -> None:
    found = TfidfEncoder(TEXTS).encode(["artery vessel vessel", "unknown"], batch_size=3)
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit(TEXTS)
    expected = vectorizer.transform(["artery vessel vessel", "unknown"]).toarray()
    np.testing.assert_array_equal(found.toarray(), expected)


def test_options_are_the_vectorizers() -> None:
    model = TfidfEncoder(TEXTS, sublinear_tf=False, ngram_range=(1, 2))
    assert "civil wrong" in model.vectorizer.vocabulary_
    assert not model.vectorizer.sublinear_tf


def test_no_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty vocabulary"):
        TfidfEncoder(["", " "])
