"""Functions over tensors: the mathematics, its reference, its gradient and the choice of backend.

One operation per folder. Its ``__init__.py`` has the public function and the mathematics,
``reference.py`` the form in plain PyTorch, the files beside it the other forms, each named after
its backend. All are ``torch.library`` ops of the namespace ``moe_fast``. Every function takes
``backend=`` as its last argument.
"""

from moe_fast.ops.backends import available_backends, show_backends, use_backend
from moe_fast.ops.combine_rows import combine_rows
from moe_fast.ops.expert_linear import expert_linear
from moe_fast.ops.expert_mlp import expert_mlp
from moe_fast.ops.expert_mlp_norm import expert_mlp_norm
from moe_fast.ops.gather_rows import gather_rows
from moe_fast.ops.info_nce import InfoNCEStats, info_nce
from moe_fast.ops.info_nce.matryoshka import matryoshka_info_nce
from moe_fast.ops.plan import RoutingPlan, plan
from moe_fast.ops.route import Routing, route
from moe_fast.ops.varlen_attention import varlen_attention

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
