"""bench.moves: calls between files of moe_fast, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bench.moves import PACKAGE, count_moves
from moe_fast import ops


def test_calls_from_one_of_our_files_to_another_are_counted():
    ids = torch.tensor([[0], [1]])
    ops.plan(ids, 2, backend="torch")  # what is found out once is not counted
    moves = count_moves(lambda: [ops.plan(ids, 2, backend="torch") for _ in range(3)])
    plan = f"{PACKAGE}ops/plan/__init__.py"
    assert moves.calls[plan, f"{PACKAGE}ops/checked_calls.py"] == 3
    assert all(start != end for start, end in moves.calls)
    assert {plan, *(end for _, end in moves.calls)} == moves.files
    assert all(Path(file).is_file() for file in moves.files)


def test_other_libraries_are_no_files_of_ours_and_profiling_ends():
    assert not count_moves(lambda: torch.nn.Linear(2, 2)(torch.ones(1, 2))).files
    assert sys.getprofile() is None
