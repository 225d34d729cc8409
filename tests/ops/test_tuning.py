"""tune: where it cannot run it says why; tests/cli/test_tune.py runs it, interpreted."""

from __future__ import annotations

import pytest

from moe_fast.ops import triton_backend
from moe_fast.ops.tuning import tune


def test_where_the_kernels_cannot_run_it_says_why(monkeypatch):
    monkeypatch.setattr(triton_backend, "_INSTALLED", False)
    with pytest.raises(RuntimeError, match="nothing to tune on cpu: triton is not installed"):
        tune(16, 32, 2, tokens=8, device="cpu")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="not for meta"):
        tune(16, 32, 2, tokens=8, device="meta")
