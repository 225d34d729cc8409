"""A baseline that compares texts by their words alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_fast.data.words import words
from moe_fast.evaluation.optional import require


class TfidfEncoder:
    """TF-IDF vectors, with the ``encode`` of a model: words in common, weighted by rarity.

    Args:
        texts: what the vocabulary and the rarities are taken from, such as the training texts or
            the corpus searched.
        **options: of scikit-learn's ``TfidfVectorizer``. Unless they say otherwise, term
            frequencies are logarithmic (``sublinear_tf=True``) and texts are taken apart by
            :func:`moe_fast.data.words.words`, which knows scripts without spaces and words of one
            letter.

    Raises:
        ValueError: no texts, or texts without a word.
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
        """Unit vectors [N, words], a SciPy CSR matrix; both options are ignored."""
        return self.vectorizer.transform(texts)
