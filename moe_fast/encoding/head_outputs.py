"""What an encoder with three heads gives for N texts, and the scores between two such sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from moe_fast import ops

# Of the dense, sparse and multi-vector score in their sum, as published for BGE-M3's training.
SCORE_WEIGHTS = (1.0, 0.3, 1.0)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class HeadOutputs:
    """The outputs for N texts, in the order of the texts; ``None``: not asked for.

    Attributes:
        dense: [N, d] float32.
        sparse: [N, V] float32, a ``scipy.sparse.csr_matrix`` with a column per vocabulary id; its
            entries are the positive weights, ids in increasing order.
        multi_vector: N arrays [L_i, D'] float32, unit vectors of the text's tokens without the
            first token and without padding.
    """

    dense: Floats | None = None
    sparse: scipy.sparse.csr_matrix | None = None
    multi_vector: list[Floats] | None = None

    def lexical_weights(self, tokenizer: Any = None) -> list[dict[str, float]]:
        """The sparse output as one dict per text, token to weight, as FlagEmbedding gives it.

        Args:
            tokenizer: ``None``: tokens are given by their vocabulary ids, as strings; else by their
                names in this tokenizer.

        Raises:
            ValueError: there is no sparse output.
        """
        rows = _needed(self.sparse, "sparse")
        name = str if tokenizer is None else tokenizer.convert_ids_to_tokens
        return [
            {
                name(int(i)): float(w)
                for i, w in zip(rows.indices[first:last], rows.data[first:last], strict=True)
            }
            for first, last in zip(rows.indptr, rows.indptr[1:], strict=False)
        ]


@dataclass(frozen=True)
class HeadScores:
    """Scores of Q queries against P documents, each [Q, P] float32; ``None``: not computed."""

    dense: Floats | None
    sparse: Floats | None
    multi_vector: Floats | None
    combined: Floats


def head_scores(
    queries: HeadOutputs,
    documents: HeadOutputs,
    weights: Sequence[float] = SCORE_WEIGHTS,
) -> HeadScores:
    """Score every query against every document, by each head and by the weighted sum.

        dense           <q, p>
        sparse          sum of w_q[i] w_p[i] over the vocabulary ids i that both texts have
        multi_vector    mean over the query's vectors of the largest inner product with one of the
                        document's (MaxSim); 0 if one of the texts has none

    Args:
        queries, documents: results of ``encode`` of the same model.
        weights: of the dense, sparse and multi-vector score in the sum. An output whose weight is 0
            is not needed, and not scored.

    Raises:
        ValueError: the weights are not three finite numbers, not all 0, or an output with a weight
            is missing.

    Source: Chen et al., arXiv 2402.03216, section 3.2.
    """
    if len(weights) != 3 or not np.isfinite(weights).all() or not np.any(weights):
        raise ValueError(f"weights must be three finite numbers, not all 0; got {list(weights)}.")
    dense = sparse = multi = None
    if weights[0]:
        dense = _needed(queries.dense, "dense") @ _needed(documents.dense, "dense").T
    if weights[1]:
        product = _needed(queries.sparse, "sparse") @ _needed(documents.sparse, "sparse").T
        sparse = product.toarray()
    if weights[2]:
        multi = _maxsim(
            _needed(queries.multi_vector, "multi_vector"),
            _needed(documents.multi_vector, "multi_vector"),
        )
    parts = [w * s for w, s in zip(weights, (dense, sparse, multi), strict=True) if s is not None]
    return HeadScores(dense, sparse, multi, sum(parts[1:], parts[0]))


def _maxsim(queries: list[Floats], documents: list[Floats]) -> Floats:
    if not queries or not documents:
        return np.zeros((len(queries), len(documents)), np.float32)
    (q, q_starts), (p, p_starts) = _packed(queries), _packed(documents)
    with torch.no_grad():
        return ops.maxsim(q, p, q_starts, p_starts).numpy()


def _packed(texts: list[Floats]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors one after the other, [T, D'], and where each text's begin, [N + 1]."""
    starts = np.cumsum([0, *(len(text) for text in texts)])
    return torch.from_numpy(np.concatenate(texts)), torch.from_numpy(starts)


def _needed(output: Any, name: str) -> Any:
    if output is None:
        raise ValueError(
            f"the {name} output is needed, and was not asked for: encode(..., outputs=[{name!r}])."
        )
    return output


def lexical_rows(
    texts: NDArray[np.int64],
    ids: NDArray[np.int64],
    weights: Floats,
    num_texts: int,
    vocab_size: int,
) -> scipy.sparse.csr_matrix:
    """One row per text: for each vocabulary id the largest weight of the tokens that have it.

    Args:
        texts, ids, weights: of each token, its text, its vocabulary id and its weight, >= 0.
        num_texts, vocab_size: the shape of the result, [N, V].
    """
    kept = weights > 0
    texts, ids, weights = texts[kept], ids[kept], weights[kept]
    order = np.lexsort((ids, texts))
    texts, ids, weights = texts[order], ids[order], weights[order]
    new = np.ones(len(ids), bool)
    new[1:] = (texts[1:] != texts[:-1]) | (ids[1:] != ids[:-1])
    first = np.flatnonzero(new)
    largest = np.maximum.reduceat(weights, first) if len(first) else weights
    counts = np.bincount(texts[first], minlength=num_texts)
    starts = np.concatenate(([0], np.cumsum(counts)))
    shape = num_texts, vocab_size
    return scipy.sparse.csr_matrix((largest, ids[first], starts), shape=shape)
