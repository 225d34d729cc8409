"""Collected only where Triton interprets: tests/triton_ops/test_interpreted.py starts such runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads the variable when it decorates, which any earlier test of a process may have caused.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

GUARD = 64  # elements before and behind every tensor that a launcher makes


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors lie between guards and hold NaN (-99); guards that were written to are found."""
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size, dtype=None, device=None) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(shape).numel()
        buffer = plain(self, count + 2 * GUARD, dtype=dtype, device=device)
        buffer.fill_(float("nan") if buffer.is_floating_point() else -99)
        buffers.append((buffer, buffer.clone()))
        return buffer[GUARD : GUARD + count].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer, before in buffers:
        for side in (slice(0, GUARD), slice(-GUARD, None)):
            assert torch.equal(buffer[side].nan_to_num(7), before[side].nan_to_num(7))
