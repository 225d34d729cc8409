"""An index of documents by the outputs of three heads, and the search in it.

- dense: a faiss index, see :mod:`moe_fast.inference.index`, with the vectors beside it;
- sparse: an inverted index: for each vocabulary id the documents that have it, with their weights,
  a SciPy matrix [V, N]. Its product with a query reads the rows of the query's ids alone;
- multi-vector: the token vectors, see :mod:`moe_fast.inference.token_vectors`. MaxSim is computed
  for candidates: the best documents of the dense and of the sparse search.

The scores are those of :func:`moe_fast.encoding.head_outputs.head_scores`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from moe_fast import ops
from moe_fast.encoding.head_outputs import SCORE_WEIGHTS, HeadOutputs
from moe_fast.inference.index import VectorIndex, check_rescore, load_index, search_index
from moe_fast.inference.token_vectors import TokenVectors, load_token_vectors
from moe_fast.ops.checks import check_choice, check_count

SEARCHES = ("sparse", "multi", "hybrid")
HEADS, DENSE, SPARSE = "heads.json", "dense", "sparse.npz"
_QUERIES_AT_ONCE = 256

Hits = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class HeadIndex:
    """The outputs of N documents.

    Attributes:
        ids: the documents' ids, in the order of all parts.
        sparse: the inverted index, a ``scipy.sparse.csr_matrix`` [V, N] float32.
        dense: the index of the dense vectors, which it has kept.
        tokens: the token vectors. An index for sparse search alone has neither.
    """

    ids: list[str]
    sparse: scipy.sparse.csr_matrix
    dense: VectorIndex | None = None
    tokens: TokenVectors | None = None


def search_heads(
    index: HeadIndex,
    queries: HeadOutputs,
    k: int,
    *,
    by: str = "hybrid",
    candidates: int = 1000,
    weights: Sequence[float] = SCORE_WEIGHTS,
    rescore: int = 0,
) -> Hits:
    """Find the k documents with the highest scores for each query.

    Args:
        index: of N documents.
        queries: the outputs of Q queries: the sparse one, and all three unless ``by`` is "sparse".
        k: documents per query; all N if there are fewer.
        by: "sparse": the inner product of the weights. "multi": MaxSim. "hybrid": the weighted sum
            of the dense, sparse and MaxSim scores.
        candidates: for "multi" and "hybrid", documents that are taken from each of the dense and
            the sparse search; at least N of them make the search exact.
        weights: of the three scores in the sum.
        rescore: for "multi" and "hybrid", compute MaxSim again by the kept token vectors for this
            many of the best documents; 0: by the codes alone.

    Returns:
        (scores [Q, k] float32, rows [Q, k] int64), best first, of equal scores the lower row first.
        Where fewer are found, as by sparse search, which finds documents that share a token with
        the query, the remaining rows are -1.

    Raises:
        TypeError, ValueError: an argument is out of range, or the index lacks a part.
    """
    check_choice("by", by, SEARCHES)
    check_count("k", k)
    check_count("candidates", candidates)
    if len(weights) != 3 or not np.isfinite(weights).all() or not np.any(weights):
        raise ValueError(f"weights must be three finite numbers, not all 0; got {list(weights)}")
    if candidates < k and by != "sparse":
        raise ValueError(f"candidates must be at least k = {k}; got {candidates}")
    assert queries.sparse is not None
    if by != "sparse":
        if index.dense is None or index.tokens is None:
            raise ValueError(f"by={by!r}: the index was built for sparse search alone")
        check_rescore(rescore, k, index.tokens.exact)
    elif rescore:
        raise ValueError("rescore is for multi and hybrid search; a sparse search is exact")
    k = min(k, len(index.ids))
    number = queries.sparse.shape[0]
    scores, rows = np.full((number, k), -np.inf, np.float32), np.full((number, k), -1, np.int64)
    for start in range(0, number, _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        product = queries.sparse[part] @ index.sparse
        nearest = None
        if by != "sparse":
            assert queries.dense is not None and index.dense is not None
            nearest = search_index(index.dense, queries.dense[part], candidates)[1]
        for i in range(product.shape[0]):
            lexical = product.indices[slice(*product.indptr[i : i + 2])]
            shared = product.data[slice(*product.indptr[i : i + 2])]
            if nearest is None:
                found, values = _best(lexical, shared, k)
            else:
                chosen = np.union1d(
                    nearest[i][nearest[i] >= 0], _best(lexical, shared, candidates)[0]
                )
                query = _Query(queries, start + i, product[i])
                used = (0.0, 0.0, 1.0) if by == "multi" else tuple(weights)
                found, values = _ranked(index, query, chosen, used, k, rescore)
            rows[start + i, : len(found)], scores[start + i, : len(found)] = found, values
    return scores, rows


class _Query:
    """One query's outputs, and its sparse scores of all documents, a row [1, N]."""

    def __init__(self, queries: HeadOutputs, place: int, lexical: Any) -> None:
        assert queries.dense is not None and queries.multi_vector is not None
        self.dense, self.tokens = queries.dense[place], queries.multi_vector[place]
        self.lexical = lexical


def _ranked(
    index: HeadIndex,
    query: _Query,
    documents: NDArray[np.int64],
    weights: tuple[float, ...],
    k: int,
    rescore: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Score documents by the weighted sum, and return the best k."""
    assert index.dense is not None and index.dense.vectors is not None
    others = np.zeros(len(documents), np.float32)
    if weights[0]:
        vector = query.dense
        if index.dense.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        others += weights[0] * (index.dense.vectors[documents] @ vector)
    if weights[1]:
        others += weights[1] * query.lexical.toarray().ravel()[documents]
    if not weights[2]:
        return _best(documents, others, k)
    scores = others + weights[2] * _maxsim(index, query, documents, exact=False)
    if not rescore:
        return _best(documents, scores, k)
    chosen = np.lexsort((documents, -scores))[:rescore]
    documents, others = documents[chosen], others[chosen]
    scores = others + weights[2] * _maxsim(index, query, documents, exact=True)
    return _best(documents, scores, k)


def _maxsim(
    index: HeadIndex, query: _Query, documents: NDArray[np.int64], *, exact: bool
) -> NDArray[np.float32]:
    """MaxSim of one query with documents, [n]."""
    assert index.tokens is not None
    vectors, starts = index.tokens.of(documents.tolist(), exact=exact)
    asked = torch.from_numpy(np.ascontiguousarray(query.tokens, np.float32))
    own = torch.tensor([0, len(asked)])
    with torch.no_grad():
        scores = ops.maxsim(asked, torch.from_numpy(vectors), own, torch.from_numpy(starts))
    return scores.numpy()[0]


def _best(documents: Any, scores: Any, k: int) -> tuple[Any, Any]:
    """The k highest scores; of equal ones the lower document first."""
    order = np.lexsort((documents, -scores))[:k]
    return documents[order], scores[order]


def save_head_index_parts(ids: list[str], sparse: Any, folder: Path, about: dict[str, Any]) -> None:
    """Write the sparse part, the ids, and ``about``, which says how the index was made."""
    scipy.sparse.save_npz(folder / SPARSE, sparse)
    (folder / HEADS).write_text(json.dumps({**about, "ids": ids}), encoding="utf-8")


def load_head_index(folder: str | os.PathLike[str]) -> HeadIndex:
    """Load an index that :func:`moe_fast.inference.head_build.build_head_index` has written.

    Raises:
        FileNotFoundError: the folder has no such index.
        ValueError: a file cannot be read, or the files do not belong together.
        ImportError: faiss is not installed.
    """
    folder = Path(folder)
    for name in (HEADS, SPARSE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"index {str(folder)!r}: there is no file {name} in it")
    try:
        ids = json.loads((folder / HEADS).read_text(encoding="utf-8"))["ids"]
        sparse = scipy.sparse.load_npz(folder / SPARSE).tocsr()
    except (ValueError, KeyError, TypeError, RecursionError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"index {str(folder)!r} cannot be read ({str(error)[:200]})") from error
    dense = tokens = None
    if (folder / DENSE).is_dir():
        dense, tokens = load_index(folder / DENSE), load_token_vectors(folder)
        if dense.vectors is None or dense.ids != ids or len(tokens.starts) != len(ids) + 1:
            raise ValueError(f"index {str(folder)!r}: its files do not belong together")
    if not isinstance(ids, list) or sparse.shape[1] != len(ids):
        raise ValueError(f"index {str(folder)!r}: {HEADS} and {SPARSE} do not belong together")
    return HeadIndex(ids, sparse, dense, tokens)
