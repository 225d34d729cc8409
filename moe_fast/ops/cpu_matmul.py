"""Products of float32 matrices on the CPU by oneDNN, where torch would ask its BLAS.

The BLAS that torch ships reaches half of an AMD processor's peak (MKL: 110 of 250 GFLOP/s, one
thread of a Zen 5); oneDNN, which torch ships too, reaches all of it, and as much as MKL on Intel's.
The way to it is the op behind ``torch.compile``'s linear layers: private, so it is used only after
it has computed a product correctly. Dtypes are the caller's choice: autocast is off.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_fast.compat import onednn_linear

# Fewer multiplications than this are over before oneDNN has found its kernel.
_SMALLEST = 2**22


def multiply(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x [m, k] . y [k, n], in ``out`` where that is given and of use."""
    if _suits(x, y):
        return _linear(x, y.t())
    with torch.autocast(x.device.type, enabled=False):
        return torch.mm(x, y, out=out)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds x [m, k] . y [k, n] to ``total`` [m, n] in place."""
    if _suits(x, y):
        total += _linear(x, y.t())
        return
    with torch.autocast(x.device.type, enabled=False):
        total.addmm_(x, y)


def _suits(x: Tensor, y: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == y.dtype == torch.float32
        and x.shape[0] * x.shape[1] * y.shape[1] >= _SMALLEST
        and bool(torch.backends.mkldnn.enabled)
        and _works()
    )


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return onednn_linear(_dense(x), _dense(weight))


def _dense(x: Tensor) -> Tensor:
    """x itself, or a copy where it is a part of wider rows: these oneDNN multiplies very slowly."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


@functools.cache
def _works() -> bool:
    """Whether this torch has the op and it multiplies, transposed views too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 65, generator=generator)
    y = torch.randn(47, 65, generator=generator)
    try:
        products = _linear(x, y), _linear(y, x).t()
        more = _linear(x.t(), x.t()), x.t() @ x
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    pairs = [(products[0], x @ y.t()), (products[1], x @ y.t()), more]
    return all(torch.allclose(p, q, rtol=1e-4, atol=1e-4) for p, q in pairs)
