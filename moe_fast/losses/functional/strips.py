"""Losses of a B x N matrix in strips of rows, so that the matrix is never whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits at a time: 16 MiB in float32, and a few times that in what is made of them.
STRIP_LOGITS = 2**22


def strips(rows: int, columns: int) -> list[tuple[int, int]]:
    """(first, last) of the strips of a matrix of ``rows`` x ``columns``."""
    height = max(1, STRIP_LOGITS // columns)
    return [(first, min(first + height, rows)) for first in range(0, rows, height)]


def map_strips(function: Callable[[int, int], Tensor], rows: int, columns: int) -> list[Tensor]:
    """``function(first, last)`` of each strip."""
    return [function(*strip) for strip in strips(rows, columns)]


def sum_over_strips(function: Callable[[int, int], Tensor], rows: int, columns: int) -> Tensor:
    """The sum of ``function(first, last)`` over the strips.

    Where there are several, each is computed again in the backward pass.
    """
    parts = strips(rows, columns)
    if len(parts) == 1:
        return function(*parts[0])
    again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(*part) for part in parts]).sum(0)
