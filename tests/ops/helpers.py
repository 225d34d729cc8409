"""What the op tests share: measuring errors, collecting gradients, recording op calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_fast.ops import native

# float64 rounds at 1.1e-16, and the tests' sums have at most a few hundred terms of unit scale:
# 1e-10 is far above any rounding and far below the effect of any term left out or counted twice.
FLOAT64 = 1e-10
# Lower precisions are compared with the float64 oracle *on the same rounded inputs*: what is left
# is the op's own arithmetic, a handful of roundings (6e-8, 3.9e-3, 4.9e-4 each) of the result and
# of the intermediate activations.
TOLERANCES = {
    torch.float64: FLOAT64,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The same examples in every run: a failure must be reproducible from its log.
property_test = settings(deadline=None, derandomize=True, database=None, max_examples=25)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|: 0 is only matched by 0, NaN and inf by nothing.

    Relative to the tensor's largest entry, not elementwise: a sum that cancels has no relative
    accuracy of its own. And never with an absolute tolerance, which small values would hide in.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().max().item()
    if difference != difference:
        return float("inf")
    if difference == 0.0:
        return 0.0
    largest = expected.abs().max().item()
    return difference / largest if largest else float("inf")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = FLOAT64, what: str = ""):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what or 'tensor'}: relative error {error:.2e} > {tolerance:.0e}"


def leaves(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """Fresh leaves that want gradients (floating-point tensors only; ``None`` stays)."""
    return {
        name: None if t is None else t.detach().clone().requires_grad_(t.is_floating_point())
        for name, t in tensors.items()
    }


def gradients(
    outputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    inputs: dict,
    retain_graph: bool = True,  # a compiled graph gives its buffers away and wants False
) -> dict:
    """The gradient of sum_i <outputs_i, upstream_i> for each tensor of ``inputs``, by name."""
    wanted = {n: t for n, t in inputs.items() if t is not None and t.requires_grad}
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(t) for name, t in wanted.items()}
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        list(wanted.values()),
        [u.to(o.dtype) for o, u in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, grads, strict=True))


def assert_gradients_close(actual: dict, expected: dict, tolerance: float = FLOAT64) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, f"gradient of {name}")


class RecordOps(TorchDispatchMode):
    """Collects the calls of registered moe_fast ops within the block, arguments included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple, dict]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "moe_fast":
            self.calls[func.name()] = (func, args, kwargs)
        return func(*args, **kwargs)


def opcheck_calls(function: Callable[[], Any], expected: set[str]) -> None:
    """Run ``function``, then ``torch.library.opcheck`` on every moe_fast op it called.

    Recording the calls instead of writing the arguments down keeps the ops' registered
    signatures, which are private, out of the tests. A backend's name in an op's does not count.
    """
    with RecordOps() as recorded:
        function()
    called = {name.replace("_triton", "") for name in recorded.calls}
    assert called == {f"moe_fast::{name}" for name in expected}
    for name, (op, args, kwargs) in recorded.calls.items():
        # Backward ops have no backward of their own.
        differentiable = not name.endswith("_backward")
        args, kwargs = (
            torch.utils._pytree.tree_map_only(
                Tensor,
                lambda t, d=differentiable: (
                    t.detach().clone().requires_grad_(d and t.is_floating_point())
                ),
                given,
            )
            for given in (args, kwargs)
        )
        outputs = torch.utils._pytree.tree_leaves(op(*args, **kwargs))
        # The tests' memory starts as NaN: an output that holds some is not written in full.
        assert not any(torch.isnan(o).any() for o in outputs), f"{name} leaves memory unwritten"
        torch.library.opcheck(op, args, kwargs)


def assert_says(error: pytest.ExceptionInfo, *fragments: object) -> None:
    """An error names the argument, what was given and what is allowed: each must be in it."""
    message = str(error.value)
    missing = [str(f) for f in fragments if str(f) not in message]
    assert not missing, f"{message!r} does not mention {missing}"


def need_native_library() -> None:
    """Skip the module where the library does not load; with ``CI=true`` that is a failure."""
    reason = native.why_unavailable("cpu")
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(f"CI needs the native library: {reason}", pytrace=False)
    elif reason is not None:
        pytest.skip(f"{reason}: make setup", allow_module_level=True)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run a block with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
