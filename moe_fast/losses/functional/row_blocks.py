"""Computes losses of a large matrix in blocks of rows, so that it is never held as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits per block: 16 MiB in float32. Intermediate results take a few times as much.
BLOCK_LOGITS = 2**22


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Return (first, last) of each block of rows of a matrix, rows ``first`` to ``last - 1``."""
    height = max(1, BLOCK_LOGITS // columns)
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def map_row_blocks(function: Callable[[int, int], Tensor], rows: int, columns: int) -> list[Tensor]:
    """Return the results of ``function(first, last)`` for all blocks."""
    return [function(*block) for block in row_blocks(rows, columns)]


def sum_over_row_blocks(function: Callable[[int, int], Tensor], rows: int, columns: int) -> Tensor:
    """Return the sum of ``function(first, last)`` over all blocks.

    If there are several blocks, the backward pass computes each of them again.
    """
    blocks = row_blocks(rows, columns)
    if len(blocks) == 1:
        return function(*blocks[0])
    again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(*block) for block in blocks]).sum(0)
