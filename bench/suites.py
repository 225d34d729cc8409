"""The same cases for pytest-benchmark: ``pytest bench/suites.py -k plan``, in a checkout.

pytest-benchmark times one candidate at a time, all of its rounds in a row: a machine that changes
its speed between two candidates changes their ratio. So its statistics here are of ours alone, and
``extra_info["rows"]`` holds the comparison with every peer, alternating, by :func:`measure`.
MOE_FAST_BENCH_SIZE chooses the shapes (default: quick).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

import pytest
import torch

from bench.__main__ import TIMED
from bench.cases import Case, measure, show

SIZE = os.environ.get("MOE_FAST_BENCH_SIZE", "quick")


def all_cases() -> Iterator[Case]:
    """Every case of every operation file."""
    for name in TIMED:
        yield from import_module(f"bench.{name}").cases(SIZE)


@pytest.mark.parametrize("case", list(all_cases()), ids=str)
def test_case(case: Case, benchmark: Any) -> None:
    """Check and compare, then let pytest-benchmark time the baseline."""
    rows = measure(case, seconds=2.0)
    print(show(rows))
    benchmark.group = case.operation
    benchmark.extra_info["rows"] = [asdict(row) for row in rows]
    torch.manual_seed(0)
    run = case.prepare().runs[case.baseline]
    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
