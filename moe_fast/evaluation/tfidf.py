"""Provides a baseline that compares texts by their words alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_fast.data.words import words
from moe_fast.evaluation.optional import require


class TfidfEncoder:
    """Encodes texts as TF-IDF vectors, with an ``encode`` method like a model's.

    Args:
        texts: the texts that give the vocabulary and the document frequencies, such as the training
            texts or the corpus to search.
        **options: options of scikit-learn's ``TfidfVectorizer``. By default term frequencies are
            logarithmic (``sublinear_tf=True``), and :func:`moe_fast.data.words.words` splits texts
            into words; it supports scripts without spaces and words of one letter.

    Raises:
        ValueError: there are no texts, or they have no words.
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, texts: Iterable[str], **options: Any) -> None:
        vectorizer = require("sklearn.feature_extraction.text").TfidfVectorizer
        if not options.keys() & {"analyzer", "tokenizer", "token_pattern"}:
            options = {"tokenizer": words, "token_pattern": None, **options}
        self.vectorizer = vectorizer(**{"sublinear_tf": True, **options}).fit(texts)

    def encode(
        self,
        texts: Sequence[str],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Encode texts as unit vectors [N, words], a SciPy CSR matrix; the options are ignored."""
        return self.vectorizer.transform(texts)
