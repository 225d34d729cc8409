"""How an index keeps vectors: as numbers of 4, 2 or 1 bytes, by product quantisation, or as bits.

    float32   as they are                                             4 d bytes
    float16   rounded                                                 2 d bytes
    int8      each coordinate as one of 256 steps of its range        d bytes
    pq        each 4 coordinates by the nearest of 256 learned points d / 4 bytes
    binary    the sign of each coordinate                             d / 8 bytes

Product quantisation: Jegou et al., "Product quantization for nearest neighbor search" (2011).
"""

from __future__ import annotations

from typing import Any

from moe_fast.extras import require
from moe_fast.ops.checks import check_choice

_FACTORIES = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8", "binary": "LSH"}
PRECISIONS = ("float32", "float16", "int8", "pq", "binary")
PQ_POINTS = 256  # of a part; a code has one byte per part


def factory_of(precision: str, dimension: int) -> str:
    """Return faiss' factory string for vectors of a precision.

    Args:
        precision: one of `PRECISIONS`.
        dimension: d, the size of the vectors. Where 4 does not divide it, product quantisation has
            the next smaller number of parts that does.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "pq":
        return _FACTORIES[precision]
    parts = next(m for m in range(max(1, dimension // 4), 0, -1) if dimension % m == 0)
    return f"PQ{parts}x8np"  # np: without polysemous training, which only Hamming distances use


def new_index(dimension: int, factory: str) -> Any:
    """Make an empty faiss index, which ranks by the dot product, or bits by their distance.

    Raises:
        ValueError: faiss does not know the factory string.
    """
    faiss = require_faiss()
    # faiss has bits under this metric alone.
    metric = faiss.METRIC_L2 if factory.startswith("LSH") else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(dimension, factory, metric)
    except RuntimeError as error:
        raise faiss_error(factory, error) from error
    if isinstance(index, faiss.IndexPQ):
        index.pq.cp.min_points_per_centroid = 1  # else it prints a warning
    return index


def train_index(index: Any, factory: str, sample: Any) -> None:
    """Train an index that needs it, on a float32 sample [n, d].

    Raises:
        ValueError: there are too few vectors, or faiss cannot train the index.
    """
    if index.is_trained:
        return
    if isinstance(index, require_faiss().IndexPQ) and len(sample) < index.pq.ksub:
        raise ValueError(
            f"product quantisation ({factory}) learns {index.pq.ksub} points from the vectors, and "
            f"needs as many; got {len(sample)}"
        )
    try:
        index.train(sample)
    except RuntimeError as error:
        raise faiss_error(factory, error) from error


def ranks_by_bits(index: Any) -> bool:
    """Return whether the index keeps bits, and its distances count those that differ."""
    return isinstance(index, require_faiss().IndexLSH)


def faiss_error(factory: str, error: RuntimeError) -> ValueError:
    """Return the error of a factory string that faiss refuses."""
    reason = str(error).splitlines()[0]
    return ValueError(f"index={factory!r}: faiss cannot build it ({reason})")


def require_faiss() -> Any:
    """Import faiss, or raise ImportError with the command to install it."""
    return require("faiss", "search", "search")
