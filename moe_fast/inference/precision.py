"""Stores vectors in fewer bytes, as sentence-transformers' ``quantize_embeddings`` does.

===========  =======================================================================
precision    what a vector of d numbers is stored as
===========  =======================================================================
``float32``  d numbers of 4 bytes
``float16``  d numbers of 2 bytes
``int8``     d whole numbers from -128 to 127: in which of 256 equal steps between the
             least and the greatest value of this dimension the number lies
``uint8``    the same from 0 to 255
``binary``   the signs of the numbers, 1 for those above 0, eight to a byte, the first
             one as the highest bit; minus 128, as a signed byte
``ubinary``  the same as an unsigned byte, such as faiss' binary indexes take
===========  =======================================================================

A Parquet file says in its metadata how to read its vectors, under the key ``moe_fast``: JSON with
``precision``, ``dimension`` (d) and, for ``int8`` and ``uint8``, ``ranges`` [2, d], the least and
the greatest values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_fast.extras import require
from moe_fast.ops.checks import check_choice

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
STEPS = 255
_KEY = b"moe_fast"
_DTYPES = {"binary": "int8", "ubinary": "uint8"}  # the others are the names of their dtypes


@dataclass(frozen=True)
class StoredPrecision:
    """How the vectors of a file are stored.

    Attributes:
        precision: one of ``PRECISIONS``.
        dimension: the number d of elements of a vector before it is stored.
        ranges: [2, d] float32, the least and the greatest value of each dimension; for ``int8`` and
            ``uint8`` only.

    Raises:
        ValueError: the precision is unknown; `ranges` are missing, not [2, d], not finite, or not
            in order.
    """

    precision: str
    dimension: int
    ranges: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        if not needs_ranges(self.precision):
            return
        found = None if self.ranges is None else self.ranges.shape
        if self.ranges is None or found != (2, self.dimension):
            raise ValueError(
                f"ranges must be [2, {self.dimension}], the least and the greatest value of each "
                f"dimension, for precision={self.precision!r}; got "
                f"{'None' if found is None else list(found)}"
            )
        least, greatest = self.ranges
        if not (np.isfinite(self.ranges).all() and (least <= greatest).all()):
            raise ValueError("ranges must be finite, with ranges[0] <= ranges[1]")

    @property
    def is_float(self) -> bool:
        """Whether floating-point numbers are stored."""
        return self.precision.startswith("float")

    @property
    def width(self) -> int:
        """The number of elements that are stored for a vector."""
        return -(-self.dimension // 8) if self.precision.endswith("binary") else self.dimension

    @property
    def dtype(self) -> str:
        """The dtype of these elements."""
        return _DTYPES.get(self.precision, self.precision)

    def encode(self, vectors: NDArray[np.floating]) -> NDArray[Any]:
        """Convert vectors [n, d] to what is stored, [n, width].

        Values outside the ranges become the least or the greatest step.

        Raises:
            ValueError: a number is too large for float16.
        """
        if self.is_float:
            with np.errstate(over="ignore"):
                stored = vectors.astype(self.dtype, copy=False)
            if not np.isfinite(stored).all():
                raise ValueError(f"precision={self.precision!r}: a number is too large for it")
            return stored
        quantization = require("sentence_transformers.util.quantization", "train", "precision")
        return quantization.quantize_embeddings(vectors, self.precision, self.ranges)

    def decode(self, stored: NDArray[Any]) -> NDArray[np.floating]:
        """Convert what is stored, [n, width], to floating-point vectors [n, d].

        A step becomes its centre, a sign 1 or -1.
        """
        if self.is_float:
            return stored
        if self.ranges is None:
            minus = np.uint8(128 if self.precision == "binary" else 0)
            packed = np.bitwise_xor(stored.view(np.uint8), minus)  # of a byte: adds it again
            bits = np.unpackbits(packed, axis=1, count=self.dimension)
            return 2 * bits.astype(np.float32) - 1
        least, greatest = self.ranges
        steps = stored.astype(np.float32) + (128.5 if self.precision == "int8" else 0.5)
        return least + steps * ((greatest - least) / STEPS)

    def metadata(self) -> dict[bytes, bytes]:
        """Return the entry of a Parquet file's metadata."""
        content: dict[str, Any] = {"precision": self.precision, "dimension": self.dimension}
        if self.ranges is not None:
            content["ranges"] = self.ranges.tolist()
        return {_KEY: json.dumps(content).encode()}


def from_metadata(metadata: Mapping[bytes, bytes] | None) -> StoredPrecision | None:
    """Read the entry of a Parquet file's metadata; None if there is none.

    Raises:
        ValueError: the entry is damaged.
    """
    entry = (metadata or {}).get(_KEY)
    if entry is None:
        return None
    try:
        content = json.loads(entry)
        ranges = content.get("ranges")
        return StoredPrecision(
            content["precision"],
            int(content["dimension"]),
            None if ranges is None else np.array(ranges, np.float32),
        )
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"the entry 'moe_fast' of the metadata is damaged ({error})") from error


def needs_ranges(precision: str) -> bool:
    """Return whether the precision divides the range of each dimension into steps."""
    return precision in ("int8", "uint8")


def ranges_of(pieces: Iterable[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Return the least and the greatest value of each dimension [2, d] of all pieces [n, d]."""
    found: NDArray[np.float32] | None = None
    for vectors in pieces:
        these = np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)
        found = these if found is None else merged_ranges(found, these)
    if found is None:
        raise ValueError("there are no vectors to take the ranges from")
    return found


def merged_ranges(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the ranges [2, d] that contain both."""
    return np.stack([np.minimum(first[0], second[0]), np.maximum(first[1], second[1])])
