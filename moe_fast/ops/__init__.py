"""Functions over tensors: the mathematics, its reference, its gradient and the choice of backend.

One operation per file, each with a reference in plain PyTorch registered as a ``torch.library``
op of the namespace ``moe_fast``. Every function takes ``backend=`` as its last argument.
"""

from moe_fast.ops import (  # noqa: F401 - each offers its backend
    expert_linear_triton,
    expert_mlp_norm_triton,
    expert_mlp_triton,
    info_nce_tiled,
    info_nce_triton,
    plan_triton,
    route_cpp,
    route_triton,
)
from moe_fast.ops.attention import varlen_attention
from moe_fast.ops.backends import available_backends, show_backends, use_backend
from moe_fast.ops.combine_rows import combine_rows
from moe_fast.ops.expert_linear import expert_linear
from moe_fast.ops.expert_mlp import expert_mlp
from moe_fast.ops.expert_mlp_norm import expert_mlp_norm
from moe_fast.ops.gather_rows import gather_rows
from moe_fast.ops.info_nce import InfoNCEStats, info_nce
from moe_fast.ops.matryoshka_info_nce import matryoshka_info_nce
from moe_fast.ops.plan import RoutingPlan, plan
from moe_fast.ops.route import Routing, route

__all__ = [
    "InfoNCEStats",
    "Routing",
    "RoutingPlan",
    "available_backends",
    "combine_rows",
    "expert_linear",
    "expert_mlp",
    "expert_mlp_norm",
    "gather_rows",
    "info_nce",
    "matryoshka_info_nce",
    "plan",
    "route",
    "show_backends",
    "use_backend",
    "varlen_attention",
]
