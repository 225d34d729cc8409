"""Training on sentence-transformers' trainer: what a mixture of experts over domains adds to it.

Needs the training extra: ``pip install moe-fast[train]``.
"""

from importlib.util import find_spec

_missing = [n for n in ("sentence_transformers", "datasets", "accelerate") if find_spec(n) is None]
if _missing:
    raise ImportError(
        f"moe_fast.training needs {', '.join(_missing)}, which this environment does not have: "
        "pip install moe-fast[train]"
    )

from moe_fast.training.callbacks import ExpertUsageCallback  # noqa: E402
from moe_fast.training.collator import DomainDataCollator  # noqa: E402
from moe_fast.training.sampler import DomainBatchSampler  # noqa: E402
from moe_fast.training.trainer import MoESentenceTransformerTrainer  # noqa: E402

__all__ = [
    "DomainBatchSampler",
    "DomainDataCollator",
    "ExpertUsageCallback",
    "MoESentenceTransformerTrainer",
]
