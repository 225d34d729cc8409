"""The configurations that the search tries first: about a dozen per product, chosen by hand.

They are those that the compiled code and the GPU's limits speak for (docs/kernels.md). Compiling
one takes seconds, so that a search over all combinations would spend its time on few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .config import Config, why_not

MOST = 12
# Rows, columns, depth, warps and stages of tiles of 16-bit operands; for products with an epilogue
# of their own also its parts, and the most registers (0: as many as there are).
_PLAIN = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (64, 256, 64, 4, 4),
)
_UP = (
    (128, 128, 64, 8, 3, 4, 128),
    (128, 256, 64, 8, 3, 2, 0),
    (128, 128, 64, 8, 4, 4, 128),
    (128, 256, 64, 8, 4, 2, 0),
    (128, 128, 64, 8, 3, 8, 128),
    (128, 128, 64, 4, 4, 2, 0),
)
_HEAVY_EPILOGUE = (
    (128, 128, 64, 8, 3, 4, 128),
    (128, 128, 64, 8, 3, 2, 0),
    (128, 128, 64, 8, 3, 8, 128),
    (128, 128, 64, 8, 2, 4, 128),
    (128, 128, 64, 8, 4, 2, 0),
    (128, 64, 64, 4, 4, 2, 128),
    (128, 64, 64, 8, 4, 2, 0),
    (64, 128, 64, 4, 4, 2, 0),
    (64, 256, 64, 8, 3, 4, 0),
    (256, 64, 64, 8, 3, 2, 0),
)
_WEIGHTS = (
    (128, 256, 64, 8, 4),
    (128, 256, 64, 8, 5),
    (256, 128, 64, 8, 4),
    (256, 128, 64, 8, 5),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 8, 5),
    (128, 128, 64, 4, 5),
    (128, 128, 128, 8, 4),
    (128, 256, 32, 8, 5),
    (64, 256, 64, 4, 5),
)
_PERSISTENT = (
    (128, 256, 64, 4, 3),
    (128, 256, 64, 4, 4),
    (128, 128, 64, 4, 4),
)
_NAMES = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "parts", "maxnreg")
_TILES = {
    "up": _UP,
    "linear": _PLAIN,
    "linear_transposed": _PLAIN,
    "gated_up": _HEAVY_EPILOGUE,
    "grad_hidden": _HEAVY_EPILOGUE,
    "gated_grad_hidden": _HEAVY_EPILOGUE,
    "grad_weight": _WEIGHTS,
}
_WIDE = (  # of 32-bit operands
    (64, 64, 32, 8, 3),
    (64, 64, 32, 4, 3),
    (64, 32, 32, 8, 3),
    (128, 64, 32, 8, 3),
    (128, 32, 32, 8, 3),
    (64, 64, 16, 8, 4),
)


def curated(
    start: Config,
    kernel: str,
    dtype: torch.dtype,
    target: str,
    n: int,
    k: int,
    *,
    padded: bool = False,
    gathered: bool = False,
) -> list[Config]:
    """The configurations to try, ``start`` first: :data:`MOST` at most, which all fit ``target``.

    Args:
        start: the configuration in use.
        kernel, dtype, target, n, k: as in :func:`.config.heuristic`.
        padded: whether rows are padded, which persistent programs need.
        gathered: as in :func:`.config.why_not`.
    """
    found = [start]
    for config in _all(start, kernel, dtype, target):
        fits = why_not(config, kernel, dtype, target, n, k, gathered) is None
        fits = fits and (padded or not config.persistent)
        if fits and config not in found and len(found) < MOST:
            found.append(config)
    return found


def _all(start: Config, kernel: str, dtype: torch.dtype, target: str) -> Iterator[Config]:
    """All of them, tiles by descriptors and by pointers in turn."""
    if target == "interpreter":  # the time of a tile there says nothing
        return
    for tile in _PERSISTENT:  # left out where a kernel has no such programs
        yield replace(start, **dict(zip(_NAMES, tile, strict=False)), persistent=True)
    plain = replace(start, persistent=False)
    for tile in _WIDE if dtype == torch.float32 else _TILES[kernel]:
        config = replace(plain, **dict(zip(_NAMES, tile, strict=False)))
        yield replace(config, descriptors=True)  # left out where a kernel has none
        yield replace(config, descriptors=False)
    for group in (4, 16):
        yield replace(start, group_m=group)
