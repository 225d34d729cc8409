"""Measuring trained models: retrieval metrics, where tokens go, and pictures of both.

Needs the extra ``eval`` (``pip install 'moe-fast[eval]'``); each function says so if a library is
missing.
"""

from __future__ import annotations

from moe_fast.evaluation.expert_usage import expert_usage
from moe_fast.evaluation.retrieval import (
    bootstrap_interval,
    mean_scores,
    paired_difference,
    retrieval_scores,
    search,
)

__all__ = [
    "bootstrap_interval",
    "expert_usage",
    "mean_scores",
    "paired_difference",
    "retrieval_scores",
    "search",
]
