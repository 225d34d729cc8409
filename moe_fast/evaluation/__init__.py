"""Evaluates models on pairs, retrieval and STS, measures expert usage, and draws pictures.

Each ``evaluate_*`` function returns an `Evaluation`: metrics, computed by maintained libraries, for
each domain and over all, with bootstrap intervals. `compare` computes the paired difference of two
evaluations, `format_table` makes a table of several. The extra ``eval`` is needed (``pip install
-e '.[eval]'`` in a checkout); a function raises ImportError if a library is missing. Pictures are
in `moe_fast.evaluation.plots`, an evaluator for training in `moe_fast.evaluation.evaluator`.
"""

from __future__ import annotations

from moe_fast.encoding.options import EncodeOptions
from moe_fast.encoding.vectors import embed
from moe_fast.evaluation.expert_usage import expert_usage
from moe_fast.evaluation.nearest import search
from moe_fast.evaluation.pairs import evaluate_pairs
from moe_fast.evaluation.report import format_table
from moe_fast.evaluation.result import Bootstrap, Comparison, Evaluation, Score, compare
from moe_fast.evaluation.retrieval import (
    evaluate_qrels,
    evaluate_retrieval,
    evaluate_run,
    retrieve,
)
from moe_fast.evaluation.sts import evaluate_sts
from moe_fast.evaluation.tfidf import TfidfEncoder
from moe_fast.evaluation.trec import read_run, write_run

__all__ = [
    "Bootstrap",
    "Comparison",
    "EncodeOptions",
    "Evaluation",
    "Score",
    "TfidfEncoder",
    "compare",
    "embed",
    "evaluate_pairs",
    "evaluate_qrels",
    "evaluate_retrieval",
    "evaluate_run",
    "evaluate_sts",
    "expert_usage",
    "format_table",
    "read_run",
    "retrieve",
    "search",
    "write_run",
]
