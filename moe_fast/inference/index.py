"""Builds, saves, loads and searches a faiss index of a file of vectors.

Scores are dot products. By default vectors are scaled to length 1, so that scores are cosines. The
default index is exact; faiss' factory strings, such as "IVF256,Flat" or "HNSW32,Flat", give others,
among them those that keep vectors in fewer bytes (`moe_fast.inference.codes`). Beside such an index
the vectors themselves may be kept on the disk, by which the best hits are scored again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.files import atomic_folder
from moe_fast.inference.codes import new_index, ranks_by_bits, require_faiss, train_index
from moe_fast.inference.row_files import RowFile, map_rows
from moe_fast.inference.vectors import Vectors
from moe_fast.ops.checks import check_count

EXACT = "Flat"
_INDEX, _CONTENT, _VECTORS = "index.faiss", "content.json", "vectors.f32"
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class VectorIndex:
    """A faiss index with the ids of its vectors.

    Attributes:
        index: the ``faiss.Index``.
        ids: the ids of the N vectors, in the index's order.
        normalize: whether the vectors are scaled to length 1, and queries are when searching.
        factory: faiss' factory string of the index.
        vectors: the vectors [N, d] float32, on the disk, for scoring again; ``None``: not kept.
    """

    index: Any
    ids: list[str]
    normalize: bool
    factory: str
    vectors: NDArray[np.float32] | None = None


def build_index(
    documents: Vectors,
    *,
    factory: str = EXACT,
    normalize: bool = True,
    train_rows: int = 100_000,
    keep_vectors: Path | None = None,
) -> VectorIndex:
    """Put every vector of a file into an index, piece by piece.

    Args:
        documents: vectors opened by :func:`moe_fast.inference.open_vectors`.
        factory: faiss' index factory string; "Flat" is exact.
        normalize: scale vectors to length 1, so that scores are cosines.
        train_rows: an index that must be trained, such as IVF, is trained on at most this many
            vectors, spread evenly over the file.
        keep_vectors: a new file, to which the vectors are also written, for scoring again.

    Raises:
        TypeError: `train_rows` is not an int.
        ValueError: `train_rows` is below 1, there are no vectors, or an id occurs twice.
        ValueError: faiss does not know the factory string, or has too few vectors to train.
        ImportError: faiss is not installed.
    """
    require_faiss()
    check_count("train_rows", train_rows)
    if documents.rows == 0:
        raise ValueError(f"{documents.path}: no vectors; there is nothing to search")
    index = new_index(documents.dimension, factory)
    if not index.is_trained:
        train_index(index, factory, _sample(documents, train_rows, normalize))
    kept = None if keep_vectors is None else RowFile(keep_vectors, documents.dimension, "<f4")
    ids: list[str] = []
    for keys, vectors in documents.pieces():
        prepared = _prepared(vectors, normalize)
        index.add(prepared)
        if kept is not None:
            kept.append(prepared)
        ids += keys
    _check_unique(ids, documents.path)
    mapped = None if kept is None else kept.mapped()
    return VectorIndex(index, ids, normalize, factory, mapped)


def search_index(
    index: VectorIndex, queries: NDArray[np.floating], k: int, *, rescore: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the k documents with the highest scores for each query.

    Args:
        index: an index of N documents.
        queries: [Q, d].
        k: documents per query; all N if there are fewer than k.
        rescore: take this many documents from the index, score them by the kept vectors, and return
            the best k; 0: the index's own scores.

    Returns:
        (scores [Q, k] float32, rows [Q, k] int64), best first. If an approximate index finds fewer
        than k documents, the remaining rows are -1. An index of bits gives the share of equal bits
        minus that of different ones.

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` is below 1, or the queries have another dimension than the index.
        ValueError: `rescore` is below k and not 0, or the index has no vectors.
    """
    check_count("k", k)
    check_rescore(rescore, k, index.vectors)
    if queries.ndim != 2 or queries.shape[1] != index.index.d:
        raise ValueError(
            f"queries must be [Q, {index.index.d}], the index's width; got {list(queries.shape)}"
        )
    prepared = _prepared(queries, index.normalize)
    scores, rows = index.index.search(prepared, min(rescore or k, len(index.ids)))
    if rescore:
        return _scored_again(index, prepared, rows, k)
    if ranks_by_bits(index.index):
        scores = 1 - 2 * scores / index.index.nbits
    return scores, rows


def check_rescore(rescore: int, k: int, vectors: Any) -> None:
    """Raise ValueError unless there are vectors by which `rescore` >= `k` hits can be scored."""
    if not rescore:
        return
    check_count("rescore", rescore)
    if rescore < k:
        raise ValueError(f"rescore must be at least k = {k}, or 0; got {rescore}")
    if vectors is None:
        raise ValueError(
            "rescore needs the vectors, which this index has not kept; build it with rescore"
        )


def _scored_again(
    index: VectorIndex, queries: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Score the hits by the kept vectors, and return the best k."""
    assert index.vectors is not None
    scores = np.full(rows.shape, -np.inf, np.float32)
    for query, hits, own in zip(queries, rows, scores, strict=True):
        found = hits >= 0
        own[found] = index.vectors[hits[found]] @ query
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def save_index(index: VectorIndex, folder: str | os.PathLike[str]) -> None:
    """Write an index and its ids into a folder, which gets its name when it is complete.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss = require_faiss()
    content = {"factory": index.factory, "normalize": index.normalize, "ids": index.ids}
    with atomic_folder(folder, replaces=("*",)) as temporary:
        faiss.write_index(index.index, str(temporary / _INDEX))
        if index.vectors is not None:
            kept = RowFile(temporary / _VECTORS, index.vectors.shape[1], "<f4")
            for start in range(0, len(index.vectors), _ROWS_AT_ONCE):
                kept.append(index.vectors[start : start + _ROWS_AT_ONCE])
            kept.mapped()
        (temporary / _CONTENT).write_text(json.dumps(content), encoding="utf-8")


def load_index(folder: str | os.PathLike[str]) -> VectorIndex:
    """Load an index that :func:`save_index` has written.

    Raises:
        FileNotFoundError: the folder has no index.
        ValueError: a file cannot be read, or the files do not belong together.
        ImportError: faiss is not installed.
    """
    faiss = require_faiss()
    folder = Path(folder)
    for name in (_INDEX, _CONTENT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"index {str(folder)!r}: there is no file {name} in it")
    try:
        index = faiss.read_index(str(folder / _INDEX))
        content = json.loads((folder / _CONTENT).read_text(encoding="utf-8"))
    except (RuntimeError, ValueError, RecursionError) as error:
        raise ValueError(f"index {str(folder)!r} cannot be read ({str(error)[:200]})") from error
    _check_content(content, folder / _CONTENT)
    if index.ntotal != len(content["ids"]):
        raise ValueError(
            f"index {str(folder)!r}: {index.ntotal} vectors, but {len(content['ids'])} ids"
        )
    if index.metric_type != faiss.METRIC_INNER_PRODUCT and not ranks_by_bits(index):
        raise ValueError(f"index {str(folder)!r}: {_INDEX} must rank by inner product")
    vectors = None
    if (folder / _VECTORS).is_file():
        vectors = map_rows(folder / _VECTORS, index.d, "<f4")
        if len(vectors) != index.ntotal:
            raise ValueError(
                f"index {str(folder)!r}: {index.ntotal} vectors, but {len(vectors)} in {_VECTORS}"
            )
    return VectorIndex(index, content["ids"], content["normalize"], content["factory"], vectors)


def _check_content(content: Any, path: Path) -> None:
    """Raise ValueError unless this is content that `save_index` writes."""
    kinds = {"factory": str, "normalize": bool, "ids": list}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object; got {type(content).__name__}")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: {name!r} must be a {kind.__name__}")
    ids = content["ids"]
    if not all(isinstance(key, str) and key for key in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{path}: 'ids' must be different texts, none empty")


def _prepared(vectors: NDArray[np.floating], normalize: bool) -> NDArray[np.float32]:
    """Return a float32 copy, with vectors scaled to length 1 if `normalize`."""
    prepared = np.array(vectors, dtype=np.float32, order="C")
    if normalize:
        require_faiss().normalize_L2(prepared)
    return prepared


def _sample(documents: Vectors, rows: int, normalize: bool) -> NDArray[np.float32]:
    """Return at most `rows` vectors, evenly spread over the file."""
    step = -(-documents.rows // rows)
    chosen, start = [], 0
    for _, vectors in documents.pieces():
        chosen.append(_prepared(vectors[-start % step :: step], normalize))
        start += len(vectors)
    return np.concatenate(chosen)


def _check_unique(ids: list[str], path: Path) -> None:
    if len(set(ids)) < len(ids):
        seen: dict[str, int] = {}
        for row, key in enumerate(ids):
            if key in seen:
                raise ValueError(
                    f"{path}: id {key!r} is there twice, in rows {seen[key]} and {row}"
                )
            seen[key] = row
