"""The losses' mathematics as plain functions of tensors, one idea per file.

Over embeddings: ``info_nce`` (``global_info_nce`` where several processes hold the batch),
``mnr_plus``, ``sigmoid_loss``, ``contrastive_learning_penalty``, ``distillation``,
``listwise_distillation``. Over router logits: ``load_balance``, ``z_loss``,
``domain_expert_joint`` with ``mutual_information``, ``expert_supervision``. All compute in at least
float32, autocast off.
"""

from moe_fast.losses.functional.distillation import distillation
from moe_fast.losses.functional.global_info_nce import global_info_nce
from moe_fast.losses.functional.listwise_distillation import listwise_distillation
from moe_fast.losses.functional.mnr_plus import mnr_plus
from moe_fast.losses.functional.mutual_information import domain_expert_joint, mutual_information
from moe_fast.losses.functional.penalty import contrastive_learning_penalty
from moe_fast.losses.functional.router import expert_supervision, load_balance, z_loss
from moe_fast.losses.functional.sigmoid import sigmoid_loss
from moe_fast.ops import info_nce

__all__ = [
    "contrastive_learning_penalty",
    "distillation",
    "domain_expert_joint",
    "expert_supervision",
    "global_info_nce",
    "info_nce",
    "listwise_distillation",
    "load_balance",
    "mnr_plus",
    "mutual_information",
    "sigmoid_loss",
    "z_loss",
]
