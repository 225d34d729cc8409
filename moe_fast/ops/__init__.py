"""Operations on tensors: their mathematics, references, gradients and the choice of backends.

Each operation has a folder. Its ``__init__.py`` holds the public function and the mathematics,
``reference.py`` the form in plain PyTorch; the other files hold other forms and are named after
their backends. The forms are registered as ``torch.library`` ops of the namespace ``moe_fast``.
``lora_experts.py`` is made of other operations, and has no forms of its own.
Functions with several backends take ``backend=`` as their last argument.
"""

from moe_fast.ops.add_norm import Normed, add_norm
from moe_fast.ops.attention_block import Projections, attention_block
from moe_fast.ops.backends import available_backends, show_backends, use_backend
from moe_fast.ops.combine_rows import combine_rows
from moe_fast.ops.expert_linear import expert_linear
from moe_fast.ops.expert_mlp import expert_mlp
from moe_fast.ops.expert_mlp_norm import expert_mlp_norm
from moe_fast.ops.gather_rows import gather_rows
from moe_fast.ops.info_nce import InfoNCEStats, info_nce
from moe_fast.ops.info_nce.matryoshka import matryoshka_info_nce
from moe_fast.ops.int8_expert_linear import int8_expert_linear
from moe_fast.ops.int8_expert_mlp import int8_expert_mlp
from moe_fast.ops.int8_linear import int8_linear
from moe_fast.ops.int8_weight import Int8Norm, Int8Weight, quantize_weight
from moe_fast.ops.lora_experts import LowRank, lora_linear, lora_mlp
from moe_fast.ops.maxsim import maxsim
from moe_fast.ops.plan import RoutingPlan, plan
from moe_fast.ops.route import Routing, route
from moe_fast.ops.varlen_attention import varlen_attention

__all__ = [
    "InfoNCEStats",
    "Int8Norm",
    "Int8Weight",
    "LowRank",
    "Normed",
    "Projections",
    "Routing",
    "RoutingPlan",
    "add_norm",
    "attention_block",
    "available_backends",
    "combine_rows",
    "expert_linear",
    "expert_mlp",
    "expert_mlp_norm",
    "gather_rows",
    "info_nce",
    "int8_expert_linear",
    "int8_expert_mlp",
    "int8_linear",
    "lora_linear",
    "lora_mlp",
    "matryoshka_info_nce",
    "maxsim",
    "plan",
    "quantize_weight",
    "route",
    "show_backends",
    "use_backend",
    "varlen_attention",
]
