"""When the triton backend is offered; ``tests/test_imports.py``: without Triton."""

from __future__ import annotations

import pytest

from moe_fast.ops import backends

from .processes import needs_triton

OPS = ("route", "plan", "expert_mlp", "expert_mlp_norm", "expert_linear", "info_nce")


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_it_says_so(op):
    assert "Triton kernels run on GPUs" in backends.why_unavailable(op, "triton", "cpu")
    assert "not for mps" in backends.why_unavailable(op, "triton", "mps")
