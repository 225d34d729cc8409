"""expert_mlp in C++, on the CPU: kernels/csrc/cpu/expert_mlp.cpp and expert_mlp_backward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.expert_mlp.plain_weights import backward_on_plain
from moe_fast.ops.expert_mlp.reference import OPERATION


def forward(x: Tensor, up_proj: Tensor, down_proj: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Compute y and z; weights that are stored column after column are not copied."""
    if not _in_columns(up_proj, down_proj):
        up_proj, down_proj = up_proj.contiguous(), down_proj.contiguous()
    rest = (t.contiguous() if isinstance(t, Tensor) else t for t in others)
    op = torch.ops.moe_fast_cpp.expert_mlp
    return native.call_on_views(op, x.contiguous(), up_proj, down_proj, *rest)


def _in_columns(up_proj: Tensor, down_proj: Tensor) -> bool:
    """Whether they are views of [E, D, U] (or, halves apart, [E, D, H, 2]) and [E, H, D]."""
    apart = up_proj.dim() == 4
    orders = ((0, 3, 2, 1), (0, 3, 1, 2)) if apart else ((0, 2, 1),)
    stored = any(up_proj.permute(order).is_contiguous() for order in orders)
    return stored and down_proj.mT.is_contiguous()


run = OPERATION.implement(
    "expert_mlp_cpp", forward, backward_on_plain(native.kernel("expert_mlp_backward"))
)
backends.register("expert_mlp", "cpp", run, native.why_no_products, dtypes=COMPILED_DTYPES)
