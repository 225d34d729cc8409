"""When the triton backend is offered, and that importing moe_fast needs no Triton."""

from __future__ import annotations

import pytest

from moe_fast.ops import backends

from .processes import needs_triton, run

OPS = ("route", "plan", "expert_mlp", "expert_mlp_norm", "expert_linear", "info_nce")
REASONS = f"""
from moe_fast.ops import backends
for op in {OPS}:
    print([backends.why_unavailable(op, "triton", d) for d in ("cpu", "mps")])
"""
NO_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
"""


def test_without_triton_it_says_so():
    done = run("-c", NO_TRITON + REASONS, TRITON_INTERPRET=None)
    assert done.stdout.count("triton is not installed") == 12, done.stderr


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_it_says_so(op):
    assert "Triton kernels run on GPUs" in backends.why_unavailable(op, "triton", "cpu")
    assert "not for mps" in backends.why_unavailable(op, "triton", "mps")
