"""When the triton backend is offered; ``tests/test_imports.py``: without Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_fast.ops import backends

from .processes import needs_triton

OPS = ("route", "plan", "expert_mlp", "expert_mlp_norm", "expert_linear", "info_nce")


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_it_says_so(op):
    assert "Triton kernels run on GPUs" in backends.why_unavailable(op, "triton", "cpu")
    assert "not for mps" in backends.why_unavailable(op, "triton", "mps")


@pytest.fixture
def two_gpus(monkeypatch):
    """GPU 0, the current one, and GPU 1; a function sets their capabilities."""
    capabilities = {}

    def capability(device=None):
        return capabilities[0 if device is None else device]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    return capabilities


@needs_triton
@pytest.mark.parametrize(("old", "new"), [(0, 1), (1, 0)])
def test_the_tensor_s_gpu_counts_and_not_the_current_one(two_gpus, old, new):
    """A machine with an old and a new GPU: kernels run on the new one, whichever is current."""
    two_gpus.update({old: (7, 5), new: (9, 0)})

    def select(index: int, backend: str | None = "triton") -> Callable:
        device = torch.device("cuda", index)
        return backends.select("expert_mlp", backend, device, torch.bfloat16, act="gelu")

    assert select(new) is backends._registry["expert_mlp", "triton"].run
    assert select(new, None) is select(new)
    with pytest.raises(ValueError, match=r"capability 7\.5, the kernels need 8\.0"):
        select(old)
    assert select(old, None) is not select(new)
    reasons = [backends.why_unavailable("expert_mlp", "triton", "cuda", i) for i in (old, new)]
    assert "7.5" in reasons[0] and reasons[1] is None
    current = backends.why_unavailable("expert_mlp", "triton", "cuda")
    assert current == (reasons[0] if old == 0 else None)
