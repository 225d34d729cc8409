"""Searches for hard negatives, by the vectors of a model or by words.

Both answer the same question, and tell what a row's own positives score, to which the others are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_fast.data.words import words
from moe_fast.extras import require

Positives = Sequence[Sequence[int]]
"""Of each query, the rows of the documents that answer it."""


@dataclass(frozen=True)
class Found:
    """The best k documents of each of Q queries.

    Attributes:
        rows: [Q, k] int64, best first.
        scores: [Q, k] float64.
        positive_scores: [Q] float64, of the best of the query's positives, found or not.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    positive_scores: NDArray[np.float64]


def search_vectors(
    queries: NDArray[np.floating], documents: NDArray[np.floating], positives: Positives, k: int
) -> Found:
    """By dot product, exactly, with faiss.

    Args:
        queries: [Q, d].
        documents: [N, d].
        positives: rows of each query's positives, at least one.
        k: documents per query; all N where there are fewer.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss = require("faiss", "search", "mining")
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(np.ascontiguousarray(documents, np.float32))
    asked = np.ascontiguousarray(queries, np.float32)
    scores, rows = index.search(asked, min(k, len(documents)))
    own = [float((documents[list(p)] @ queries[q]).max()) for q, p in enumerate(positives)]
    return Found(rows, scores.astype(np.float64), np.array(own, np.float64))


def search_words(
    queries: Sequence[str], documents: Sequence[str], positives: Positives, k: int
) -> Found:
    """By BM25, with bm25s and its defaults (Lucene's form, k1 = 1.5, b = .75; no stop words).

    A score is 0 where query and document share no word, and positive otherwise.

    Args:
        queries, documents: texts, taken apart by :func:`moe_fast.data.words.words`; what is no
            word of any document is ignored.
        positives, k: as in :func:`search_vectors`.

    Raises:
        ImportError: bm25s is not installed.
    """
    bm25s = require("bm25s", "search", "mining")
    of_documents = [words(text) for text in documents]
    vocabulary = {word for found in of_documents for word in found}
    index = bm25s.BM25()
    if vocabulary:  # it cannot be made of nothing
        index.index(of_documents, show_progress=False)
    k = min(k, len(documents))
    rows = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float64)
    own = np.empty(len(queries), np.float64)
    for number, query in enumerate(queries):
        known = [word for word in words(query) if word in vocabulary]
        # It cannot be asked for no words at all.
        of_all = index.get_scores(known) if known else np.zeros(len(documents))
        best = np.argsort(-of_all, kind="stable")[:k]  # equal scores: lower row first
        rows[number], scores[number] = best, of_all[best]
        own[number] = of_all[list(positives[number])].max()
    return Found(rows, scores, own)
