"""Extends sentence-transformers' trainer for mixtures of experts and data with domains.

Needs the training extra: ``pip install -e '.[train]'`` in a checkout.
"""

from importlib.util import find_spec

from moe_fast.extras import missing

for _name in ("sentence_transformers", "datasets", "accelerate"):
    if find_spec(_name) is None:
        raise missing(_name, "train", "moe_fast.training")

from moe_fast.training.callbacks import ExpertUsageCallback  # noqa: E402
from moe_fast.training.collator import DomainDataCollator  # noqa: E402
from moe_fast.training.cross_encoder_collator import CrossEncoderDomainCollator  # noqa: E402
from moe_fast.training.domain_column import DomainColumnCollator  # noqa: E402
from moe_fast.training.pooling import ExpertPoolingCallback  # noqa: E402
from moe_fast.training.sampler import DomainBatchSampler  # noqa: E402
from moe_fast.training.trainer import MoESentenceTransformerTrainer  # noqa: E402
from moe_fast.training.trim_memory import TrimMemoryCallback  # noqa: E402

__all__ = [
    "CrossEncoderDomainCollator",
    "DomainBatchSampler",
    "DomainColumnCollator",
    "DomainDataCollator",
    "ExpertPoolingCallback",
    "ExpertUsageCallback",
    "MoESentenceTransformerTrainer",
    "TrimMemoryCallback",
]
