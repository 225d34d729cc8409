"""Loads operand tiles by tensor descriptors: on sm_90 and sm_100 the TMA unit copies whole tiles.

An operand is one array of rows, or stacked weights. Each matrix of the stack has its own bounds: a
tile that extends past them is filled with zeros, never with the next expert's weights. A tile of
rows may extend into the next expert's rows, which are computed but not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config
from .launch import aligned


@triton.jit
def load_weight(w, expert, n, k, TRANSPOSED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Load a tile [BK, BN] of the transposed weights of one expert.

    Its first element is row k and column n of the transpose [K, N]; outside of it the tile is 0.
    """
    if TRANSPOSED:
        return w.load([expert, k, n]).reshape(BK, BN)
    return w.load([expert, n, k]).reshape(BN, BK).trans()


def row_descriptor(rows: Tensor, row_to_token: Tensor | None, config: Config) -> TensorDescriptor:
    """Describes tiles of BM by BK of rows [S, K], or of [T, K] by token with ``row_to_token``.

    Rows by token are copied first, because a descriptor cannot gather.
    """
    if row_to_token is not None:
        rows = rows.index_select(0, row_to_token)
    return TensorDescriptor.from_tensor(aligned(rows), [config.block_m, config.block_k])


def is_transposed(weight: Tensor) -> bool:
    """Whether stacked weights [E, N, K] have contiguous columns, not rows."""
    return weight.stride(-1) != 1 and weight.stride(-2) == 1


def weight_descriptor(weight: Tensor, config: Config) -> TensorDescriptor:
    """Describes tiles of stacked weights [E, N, K] in their layout; see :func:`load_weight`."""
    if is_transposed(weight):
        block = [1, config.block_k, config.block_n]
        return TensorDescriptor.from_tensor(aligned(weight.mT), block)
    return TensorDescriptor.from_tensor(aligned(weight), [1, config.block_n, config.block_k])
