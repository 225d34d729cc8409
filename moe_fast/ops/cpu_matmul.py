"""Multiplies float32 matrices on the CPU by oneDNN instead of the BLAS that torch uses.

torch's BLAS reaches half of an AMD processor's peak (MKL: 110 of 250 GFLOP/s, one thread of a
Zen 5). oneDNN, which torch contains too, reaches all of it, and equals MKL on Intel's processors.
It is called through the op behind ``torch.compile``'s linear layers. That op is private, so it is
used only after it has computed a product correctly. The caller chooses the dtypes: autocast is off.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_fast.compat import onednn_linear

# A product with fewer multiplications takes less time than oneDNN needs to find its kernel.
_SMALLEST = 2**22


def multiply(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x [m, k] . y [k, n].

    ``out`` is memory that may be used for the result; use the tensor that is returned.
    """
    if _suits(x, y):
        return _linear(x, y.t())
    with torch.autocast(x.device.type, enabled=False):
        return torch.mm(x, y, out=out)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x [m, k] . y [k, n] to ``total`` [m, n], in place."""
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
    """Return x, or a copy if it is part of wider rows, which oneDNN multiplies very slowly."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


@functools.cache
def _works() -> bool:
    """Whether this torch has the op, and its products are right, also of transposed views."""
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
