"""Keeps the token vectors of documents as codes, in any precision, on the disk.

The codec is an empty faiss index, of which only the coding is used. Beside the codes the vectors
themselves may be kept, in float16, by which the best documents are scored again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.inference.codes import new_index, ranks_by_bits, require_faiss, train_index
from moe_fast.inference.row_files import RowFile, map_rows

_CODEC, _CODES, _STARTS, _EXACT = "tokens.faiss", "tokens.codes", "tokens.starts", "tokens.f16"
_ROWS_AT_ONCE, _TRAIN_ROWS = 65_536, 100_000

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenVectors:
    """The token vectors of N documents, one document after the other.

    Attributes:
        codec: a trained faiss index without vectors.
        codes: [T, c] uint8, of all vectors.
        starts: [N + 1], the row at which each document begins.
        exact: [T, d] float16; ``None``: not kept.
    """

    codec: Any
    codes: NDArray[np.uint8]
    starts: NDArray[np.int64]
    exact: NDArray[np.float16] | None

    def of(self, documents: Sequence[int], *, exact: bool = False) -> tuple[Floats, Any]:
        """Return the vectors [t, d] float32 of some documents, and where each begins [n + 1]."""
        ranges = [slice(*self.starts[i : i + 2]) for i in documents]
        starts = np.cumsum([0, *(part.stop - part.start for part in ranges)])
        source = self.exact if exact else self.codes
        assert source is not None
        rows = np.concatenate([source[part] for part in ranges] or [source[:0]])
        return (rows.astype(np.float32) if exact else self._decoded(rows)), starts

    def _decoded(self, codes: NDArray[np.uint8]) -> Floats:
        if not len(codes):
            return np.zeros((0, self.codec.d), np.float32)
        vectors = self.codec.sa_decode(np.ascontiguousarray(codes))
        if ranks_by_bits(self.codec):  # 1 or -1 each
            vectors /= np.sqrt(self.codec.d)
        return vectors


def keep_token_vectors(
    vectors: NDArray[np.float32],
    lengths: Sequence[int],
    factory: str,
    folder: Path,
    *,
    exact: bool = False,
) -> TokenVectors:
    """Code the token vectors of documents, into files of a folder.

    Args:
        vectors: [T, d], of all documents; read piece by piece.
        lengths: the number of each document's vectors; their sum is T.
        factory: faiss' factory string of the codec, see `moe_fast.inference.codes.factory_of`.
        folder: an existing folder.
        exact: also keep the vectors, in float16.

    Raises:
        ValueError: faiss does not know the factory string, or there are too few vectors.
    """
    faiss = require_faiss()
    codec = new_index(vectors.shape[1], factory)
    step = max(1, -(-len(vectors) // _TRAIN_ROWS))
    train_index(codec, factory, np.array(vectors[::step], np.float32))
    codes = RowFile(folder / _CODES, codec.sa_code_size(), "u1")
    kept = RowFile(folder / _EXACT, vectors.shape[1], "<f2") if exact else None
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = np.array(vectors[start : start + _ROWS_AT_ONCE], np.float32)
        codes.append(codec.sa_encode(rows))
        if kept is not None:
            kept.append(rows)
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    of_starts = RowFile(folder / _STARTS, 1, "<i8")
    of_starts.append(starts)
    of_starts.mapped()
    faiss.write_index(codec, str(folder / _CODEC))
    return TokenVectors(codec, codes.mapped(), starts, None if kept is None else kept.mapped())


def load_token_vectors(folder: Path) -> TokenVectors:
    """Load what `keep_token_vectors` has written.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or the files do not belong together.
    """
    if not (folder / _CODEC).is_file():
        raise FileNotFoundError(f"there is no file {folder / _CODEC}")
    try:
        codec = require_faiss().read_index(str(folder / _CODEC))
    except RuntimeError as error:
        raise ValueError(f"{folder / _CODEC} cannot be read ({str(error)[:200]})") from error
    codes = map_rows(folder / _CODES, codec.sa_code_size(), "u1")
    starts = np.array(map_rows(folder / _STARTS, 1, "<i8")[:, 0])
    exact = map_rows(folder / _EXACT, codec.d, "<f2") if (folder / _EXACT).exists() else None
    rising = len(starts) > 0 and starts[0] == 0 and (np.diff(starts) >= 0).all()
    if not rising or starts[-1] != len(codes) or (exact is not None and len(exact) != len(codes)):
        raise ValueError(f"{folder}: {_CODES}, {_STARTS} and {_EXACT} do not belong together")
    return TokenVectors(codec, codes, starts, exact)
