"""A faiss index over a file of vectors: build, save, load, search.

Scores are dot products, of unit vectors (the cosine) unless told otherwise. The index is exact by
default; others by faiss' own factory strings, such as "IVF256,Flat" or "HNSW32,Flat".
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.extras import require
from moe_fast.files import atomic_folder
from moe_fast.inference.vectors import Vectors
from moe_fast.ops.checks import check_count

EXACT = "Flat"
_INDEX, _CONTENT = "index.faiss", "content.json"


@dataclass(frozen=True)
class VectorIndex:
    """A faiss index and the ids of what it holds.

    Attributes:
        index: the ``faiss.Index``.
        ids: ids [N], in the index's order.
        normalize: whether its vectors, and so the queries', were scaled to length 1.
        factory: faiss' description of the index.
    """

    index: Any
    ids: list[str]
    normalize: bool
    factory: str


def build_index(
    documents: Vectors,
    *,
    factory: str = EXACT,
    normalize: bool = True,
    train_rows: int = 100_000,
) -> VectorIndex:
    """Put every vector of a file into an index, piece by piece.

    Args:
        documents: from :func:`moe_fast.inference.open_vectors`.
        factory: faiss' index factory string; "Flat" is exact.
        normalize: scale vectors to length 1, so that scores are cosines.
        train_rows: vectors, spread evenly over the file, that an index which must be trained
            (such as IVF) is trained on.

    Raises:
        ValueError: no vectors, an id twice, a factory string that faiss does not know, or too few
            vectors to train it.
        ImportError: faiss is not installed.
    """
    faiss = require_faiss()
    check_count("train_rows", train_rows)
    if documents.rows == 0:
        raise ValueError(f"{documents.path}: no vectors; there is nothing to search")
    try:
        index = faiss.index_factory(documents.dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_sample(documents, train_rows, normalize))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"index={factory!r}: faiss cannot build it ({reason})") from error
    ids: list[str] = []
    for keys, vectors in documents.pieces():
        index.add(_prepared(vectors, normalize))
        ids += keys
    _check_unique(ids, documents.path)
    return VectorIndex(index, ids, normalize, factory)


def search_index(
    index: VectorIndex, queries: NDArray[np.floating], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best documents of each query.

    Args:
        queries: [Q, d].
        k: hits per query; all N documents where there are fewer.

    Returns:
        (scores [Q, k] float32, rows [Q, k] int64), best first. An approximate index that finds
        fewer than k fills up with row -1.

    Raises:
        ValueError: queries of another width than the index's.
    """
    check_count("k", k)
    if queries.ndim != 2 or queries.shape[1] != index.index.d:
        raise ValueError(
            f"queries must be [Q, {index.index.d}], the index's width; got {list(queries.shape)}"
        )
    return index.index.search(_prepared(queries, index.normalize), min(k, len(index.ids)))


def save_index(index: VectorIndex, folder: str | os.PathLike[str]) -> None:
    """Write an index and its ids into a folder, which appears when it is whole."""
    faiss = require_faiss()
    content = {"factory": index.factory, "normalize": index.normalize, "ids": index.ids}
    with atomic_folder(folder, replaces=("*",)) as temporary:
        faiss.write_index(index.index, str(temporary / _INDEX))
        (temporary / _CONTENT).write_text(json.dumps(content), encoding="utf-8")


def load_index(folder: str | os.PathLike[str]) -> VectorIndex:
    """An index written by :func:`save_index`.

    Raises:
        FileNotFoundError: no index there.
        ValueError: a file that cannot be read, or files that do not belong together.
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
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"index {str(folder)!r}: {_INDEX} must rank by inner product")
    return VectorIndex(index, content["ids"], content["normalize"], content["factory"])


def _check_content(content: Any, path: Path) -> None:
    """Raise unless this is what `save_index` writes."""
    kinds = {"factory": str, "normalize": bool, "ids": list}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object; got {type(content).__name__}")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: {name!r} must be a {kind.__name__}")
    ids = content["ids"]
    if not all(isinstance(key, str) and key for key in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{path}: 'ids' must be different texts, none empty")


def require_faiss() -> Any:
    """The library, or an error that says how to get it."""
    return require("faiss", "search", "search")


def _prepared(vectors: NDArray[np.floating], normalize: bool) -> NDArray[np.float32]:
    """A float32 copy, scaled to length 1 where asked for."""
    prepared = np.array(vectors, dtype=np.float32, order="C")
    if normalize:
        require_faiss().normalize_L2(prepared)
    return prepared


def _sample(documents: Vectors, rows: int, normalize: bool) -> NDArray[np.float32]:
    """At most `rows` vectors, evenly spread over the file."""
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
