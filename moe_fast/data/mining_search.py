"""Searches for hard negatives, by the vectors of a model or by words.

Both searches return a `Found`: the best documents of each query with their scores, and the score of
the query's own best positive, with which the others are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_fast.data.words import words
from moe_fast.extras import require

Positives = Sequence[Sequence[int]]
"""For each query, the rows (indices) of the documents that answer it."""


@dataclass(frozen=True)
class Found:
    """The best k documents of each of Q queries.

    Attributes:
        rows: [Q, k] int64, indices of documents, best first.
        scores: [Q, k] float64, their scores.
        positive_scores: [Q] float64, the score of the query's best positive, even if it is not
            among the best k documents.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    positive_scores: NDArray[np.float64]


def search_vectors(
    queries: NDArray[np.floating], documents: NDArray[np.floating], positives: Positives, k: int
) -> Found:
    """Search for the documents with the largest dot products, exactly, with faiss.

    Args:
        queries: [Q, d].
        documents: [N, d].
        positives: the rows of each query's positives, at least one per query.
        k: documents per query; all N if there are fewer than k.

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
    """Search by BM25, with the defaults of bm25s (Lucene's form, k1 = 1.5, b = .75; no stop words).

    A score is 0 if query and document share no word, and positive otherwise.

    Args:
        queries, documents: texts, which :func:`moe_fast.data.words.words` splits into words. Words
            of a query that are in no document are ignored.
        positives, k: as in :func:`search_vectors`.

    Raises:
        ImportError: bm25s is not installed.
    """
    bm25s = require("bm25s", "search", "mining")
    of_documents = [words(text) for text in documents]
    vocabulary = {word for found in of_documents for word in found}
    index = bm25s.BM25()
    if vocabulary:  # bm25s cannot index documents without words
        index.index(of_documents, show_progress=False)
    k = min(k, len(documents))
    rows = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float64)
    own = np.empty(len(queries), np.float64)
    for number, query in enumerate(queries):
        known = [word for word in words(query) if word in vocabulary]
        # bm25s cannot score a query without words.
        of_all = index.get_scores(known) if known else np.zeros(len(documents))
        best = np.argsort(-of_all, kind="stable")[:k]  # of equal scores the lower row comes first
        rows[number], scores[number] = best, of_all[best]
        own[number] = of_all[list(positives[number])].max()
    return Found(rows, scores, own)
