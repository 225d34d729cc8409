"""bench.passes: the same rows here and in a fresh process, whose failure is an error."""

from __future__ import annotations

import pytest
import torch

from bench.machine import Machine
from bench.passes import Pass, in_fresh_process, rows_of

MACHINE = Machine(2e10, 3e10, {"float32": 1e11})


def one(*operations: str) -> Pass:
    return Pass(operations, "tiny", 0.0, torch.get_num_threads(), MACHINE)


def test_a_fresh_process_measures_the_same_cases():
    here, there = list(rows_of(one("plan"))), list(in_fresh_process(one("plan")))
    assert [[(r.case, r.who) for r in rows] for rows, _ in there] == [
        [(r.case, r.who) for r in rows] for rows, _ in here
    ]
    rows, share = there[0]
    assert all(row.seconds.median > 0 for row in rows) and 0 < share <= 1


def test_a_process_that_fails_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="the measuring process failed with exit code 1"):
        list(in_fresh_process(one("no_such_operation")))
    assert "No module named 'bench.no_such_operation'" in capfd.readouterr().err
