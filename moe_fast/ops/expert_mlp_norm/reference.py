"""expert_mlp_norm in steps: a backend's expert_mlp, then PyTorch's own functions.

Without dropout and gradients, ``cpp`` computes the sum and the norm by its ``add_norm``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.add_norm import add_norm
from moe_fast.ops.checks import COMPILED_DTYPES


def _composition(backend: str, *arguments: Any) -> tuple[Tensor]:
    tensors, (residual, norm_weight, norm_bias) = arguments[:6], arguments[6:9]
    *plan, keep, scale, eps, act, gated, needs_grad, save = arguments[9:]
    x, top_k_weights = tensors[0], tensors[5]
    computed_in = torch.promote_types(x.dtype, top_k_weights.dtype)
    run = backends.select("expert_mlp", backend, x.device, computed_in, act)
    y, _ = run(*tensors, *plan, act, gated, save)
    if keep is not None:
        y = y * (keep.to(y.dtype) * scale)
    elif backend == "cpp" and not needs_grad and residual.dtype in (y.dtype, torch.float32):
        normed = add_norm(y, residual, norm_weight, norm_bias, eps=eps, backend=backend)
        return (normed.out if residual.dtype == y.dtype else normed.exact,)
    return (F.layer_norm(y + residual, norm_weight.shape, norm_weight, norm_bias, eps),)


backends.register("expert_mlp_norm", "torch", functools.partial(_composition, "torch"))
backends.register(
    "expert_mlp_norm",
    "cpp",
    functools.partial(_composition, "cpp"),
    native.why_no_products,
    dtypes=COMPILED_DTYPES,
)
