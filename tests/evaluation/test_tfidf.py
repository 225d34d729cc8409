from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from moe_fast.evaluation import TfidfEncoder

TEXTS = ["a stent keeps an artery open", "a tort is a civil wrong", "an artery is a vessel vessel"]


def test_the_vectors_are_scikit_learns() -> None:
    found = TfidfEncoder(TEXTS).encode(["artery vessel vessel", "unknown"], batch_size=3)
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit(TEXTS)
    expected = vectorizer.transform(["artery vessel vessel", "unknown"]).toarray()
    np.testing.assert_array_equal(found.toarray(), expected)


def test_options_are_the_vectorizers() -> None:
    model = TfidfEncoder(TEXTS, sublinear_tf=False, ngram_range=(1, 2))
    assert "civil wrong" in model.vectorizer.vocabulary_
    assert not model.vectorizer.sublinear_tf


def test_words_of_one_letter_and_of_scripts_without_spaces() -> None:
    texts = ["C or R?", "机器学习入门", "深度学习", "ภาษาไทย"]
    found = TfidfEncoder(texts)
    scores = (found.encode(["c", "学习", "ภาษา"]) @ found.encode(texts).T).toarray()
    assert (scores > 0).tolist() == [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


def test_a_pattern_of_ones_own_counts() -> None:
    model = TfidfEncoder(["ab-c d"], token_pattern=r"[a-z]-[a-z]")
    assert list(model.vectorizer.vocabulary_) == ["b-c"]


def test_no_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty vocabulary"):
        TfidfEncoder(["", " "])
