"""Losses of a B x N matrix computed in blocks of rows, so that the matrix is never held whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The logits of one block: 16 MiB in float32, and a few times that in what is made of them.
BLOCK_LOGITS = 2**22


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """The (first, last) row of each block of a matrix of ``rows`` x ``columns``."""
    height = max(1, BLOCK_LOGITS // columns)
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def map_row_blocks(function: Callable[[int, int], Tensor], rows: int, columns: int) -> list[Tensor]:
    """The results of ``function(first, last)``, one for each block."""
    return [function(*block) for block in row_blocks(rows, columns)]


def sum_over_row_blocks(function: Callable[[int, int], Tensor], rows: int, columns: int) -> Tensor:
    """The sum of ``function(first, last)`` over the blocks.

    Where there are several blocks, each one is computed again in the backward pass.
    """
    blocks = row_blocks(rows, columns)
    if len(blocks) == 1:
        return function(*blocks[0])
    again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(*block) for block in blocks]).sum(0)
