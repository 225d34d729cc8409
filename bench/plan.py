"""ops.plan against other ways to sort rows by expert.

- ``stable sort``: argsort and bincount, and the inverse permutation; the algorithm of our
  reference.
- ``transformers' sort``: an unstable sort and a histogram, as before transformers' grouped
  products. It makes no inverse permutation; transformers' sum over slots finds another way.
- ``mask per expert``: ``nonzero`` of every expert's mask, as in loops over experts; it makes no
  inverse permutation either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops

from .cases import OURS, Candidates, Case, WrongResult
from .record import Work

EXPERTS = 8


def cases(size: str) -> Iterator[Case]:
    """Yield random ids of K different experts per token."""
    tokens = {"tiny": [24], "quick": [8192], "default": [8192, 65536]}.get(
        size, [512, 8192, 65536, 524288]
    )
    for t, k in product(tokens, (1, 2)):
        yield case_of(t, EXPERTS, k)


def case_of(tokens: int, experts: int, k: int, sweep: str | None = None) -> Case:
    """Make the case of one shape."""
    return Case(
        "plan",
        {"T": tokens, "E": experts, "K": k},
        "int64",
        lambda: candidates(tokens, experts, k),
        # The ids are read; two permutations, their inverse and the offsets are written.
        Work(0, 8 * (tokens * k * 4 + experts + 1)),
        sweep,
    )


def candidates(tokens: int, experts: int, k: int) -> Candidates:
    """Make the candidates; each returns (offsets [E + 1], tokens of the sorted rows [S])."""
    index = torch.rand(tokens, experts).topk(k).indices

    def ours(backend: str | None = None) -> tuple[Tensor, Tensor]:
        made = ops.plan(index, experts, backend=backend)
        return made.expert_offsets, made.row_to_token

    runs: dict[str, Callable[[], Any]] = {
        OURS: ours,
        "stable sort": lambda: ours("torch"),
        "transformers' sort": lambda: unstable_sort(index, experts),
        "mask per expert": lambda: masks(index, experts),
    }
    return Candidates(runs, lambda outputs: check(outputs, index, experts))


def unstable_sort(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort ids; count them by a histogram of floats (torch has none of integers)."""
    ids, order = torch.sort(index.reshape(-1))
    counts = torch.histc(ids.float(), bins=experts, min=0, max=experts - 1)
    return torch.cumsum(counts, 0, dtype=torch.int32), order // index.shape[1]


def masks(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """List the tokens of each expert in turn."""
    found = [torch.where(index == expert)[0] for expert in range(experts)]
    return torch.tensor([len(tokens) for tokens in found]).cumsum(0), torch.cat(found)


def check(outputs: dict[str, Any], index: Tensor, experts: int) -> None:
    """Raise unless the rows of each expert are its tokens, in any order."""
    rows = index.tolist()
    expected = [[t for t, ids in enumerate(rows) if e in ids] for e in range(experts)]
    for name, (offsets, tokens) in outputs.items():
        ends = offsets.tolist()[-experts:]
        starts = [0, *ends[:-1]]
        listed = tokens.tolist()
        found = [sorted(listed[a:b]) for a, b in zip(starts, ends, strict=True)]
        if found != expected:
            raise WrongResult(f"{name}: rows are not in the order of their experts.")
