"""Builds an index of the three heads' outputs, piece by piece, in a folder."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from moe_fast.data.texts import TextRow
from moe_fast.encoding.head_outputs import HeadOutputs
from moe_fast.inference.head_index import DENSE, HeadIndex, load_head_index, save_head_index_parts
from moe_fast.inference.index import build_index, save_index
from moe_fast.inference.row_files import RowFile
from moe_fast.inference.token_vectors import keep_token_vectors
from moe_fast.inference.vectors import Vectors
from moe_fast.ops.checks import check_choice

BUILDS = ("sparse", "all")
_TEXTS_AT_ONCE, _ROWS_AT_ONCE = 1024, 4096

Encode = Callable[[list[TextRow], tuple[str, ...]], HeadOutputs]
"""Returns the named outputs of texts."""


def build_head_index(
    rows: Iterable[TextRow],
    encode: Encode,
    folder: Path,
    *,
    parts: str = "all",
    dense_factory: Callable[[int], str],
    token_factory: Callable[[int], str],
    normalize: bool = True,
    pool_tokens: float = 1.0,
    rescore: bool = False,
) -> HeadIndex:
    """Encode documents, and write their index into a folder.

    Args:
        rows: the documents.
        encode: see `Encode`.
        folder: an existing, empty folder.
        parts: "sparse": the inverted index alone; "all": the dense and multi-vector parts too.
        dense_factory, token_factory: give faiss' factory string for a size of vectors.
        normalize: scale the dense vectors to length 1.
        pool_tokens: merge a document's token vectors, so that one of this number is left, by
            sentence-transformers' ``HierarchicalTokenPooling``; 1: keep all.
        rescore: keep the token vectors beside their codes.

    Raises:
        ValueError: there are no documents, an id occurs twice, or faiss cannot build an index.
    """
    check_choice("parts", parts, BUILDS)
    if not pool_tokens >= 1:
        raise ValueError(f"pool_tokens must be at least 1; got {pool_tokens}")
    outputs = ("sparse",) if parts == "sparse" else ("dense", "sparse", "multi_vector")
    about = {"parts": parts, "pool_tokens": pool_tokens}
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as name:
        collected = _Collected(Path(name), pool_tokens)
        for chunk in _chunks(rows):
            collected.add(chunk, encode(chunk, outputs))
        if not collected.ids:
            raise ValueError("there are no documents")
        inverted = scipy.sparse.vstack(collected.sparse).T.tocsr()
        if parts == "all":
            vectors = collected.vectors()
            factory = dense_factory(vectors.dimension)
            kept = Path(name, "dense.kept")
            index = build_index(vectors, factory=factory, normalize=normalize, keep_vectors=kept)
            save_index(index, folder / DENSE)
            tokens = collected.tokens()
            keep_token_vectors(
                tokens,
                collected.lengths,
                token_factory(tokens.shape[1]),
                folder,
                exact=rescore,
            )
        save_head_index_parts(collected.ids, inverted, folder, about)
    return load_head_index(folder)


class _Collected:
    """The outputs so far; dense and token vectors are in files of a folder."""

    def __init__(self, folder: Path, pool_tokens: float) -> None:
        self.folder, self.pool_tokens = folder, pool_tokens
        self.ids: list[str] = []
        self.seen: set[str] = set()
        self.sparse: list[Any] = []
        self.lengths: list[int] = []
        self._dense: RowFile | None = None
        self._tokens: RowFile | None = None

    def add(self, rows: list[TextRow], outputs: HeadOutputs) -> None:
        for row in rows:
            if row.id in self.seen:
                raise ValueError(f"{row.where}: id {row.id!r} was given before")
            self.seen.add(row.id)
            self.ids.append(row.id)
        self.sparse.append(outputs.sparse)
        if outputs.dense is None or outputs.multi_vector is None:
            return
        texts = outputs.multi_vector
        if self.pool_tokens > 1:
            texts = [pooled(text, self.pool_tokens) for text in texts]
        self.lengths += map(len, texts)
        if self._dense is None:
            self._dense = RowFile(self.folder / "dense", outputs.dense.shape[1], "<f4")
            self._tokens = RowFile(self.folder / "tokens", texts[0].shape[1], "<f4")
        assert self._tokens is not None
        self._dense.append(outputs.dense)
        self._tokens.append(np.concatenate(texts))

    def tokens(self) -> Any:
        assert self._tokens is not None
        return self._tokens.mapped()

    def vectors(self) -> Vectors:
        assert self._dense is not None
        mapped = self._dense.mapped()

        def pieces() -> Iterator[tuple[list[str], Any]]:
            for start in range(0, len(mapped), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                yield self.ids[part], mapped[part]

        return Vectors(self._dense.path, len(mapped), mapped.shape[1], pieces)


def pooled(text: Any, factor: float) -> Any:
    """Merge a text's token vectors [L, d] to about L / factor unit vectors, by clustering."""
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    if len(text) < 2:
        return text
    pooling = HierarchicalTokenPooling(factor, num_protected_tokens=0)
    return pooling.pool_one(torch.from_numpy(np.ascontiguousarray(text))).numpy()


def _chunks(rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, _TEXTS_AT_ONCE)):
        yield chunk
