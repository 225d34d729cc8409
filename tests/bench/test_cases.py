"""bench.cases: wrong results stop everything, peers that fail become rows with a reason."""

from __future__ import annotations

import pytest
import torch

from bench import cases as c
from bench.machine import Machine
from bench.record import Work


def case(check=lambda outputs: None, work=None, **runs):
    candidates = c.Candidates({c.OURS: lambda: 1, **runs}, check, {"Liger": "needs a CUDA GPU"})
    return c.Case("op", {"T": 4}, "float32", lambda: candidates, work)


def measure(case, machine=None):
    return c.measure(case, machine, seconds=0, rounds=2, min_sample_seconds=0)


def test_a_wrong_result_stops_before_anything_is_timed():
    calls = []
    exact = torch.tensor([1.0, 2.0, 3.0])

    def wrong():
        calls.append(1)
        return [exact * 1.01]

    runs = {c.OURS: wrong, "peer": lambda: [exact]}
    planted = c.Case("op", {}, "float32", lambda: c.Candidates(runs, c.near([exact], 1e-5)))
    with pytest.raises(c.WrongResult, match="moe_fast, output 0: error 1.0e-02"):
        c.measure(planted)
    assert len(calls) == 1


@pytest.mark.parametrize("value", [torch.tensor([float("nan"), 1.0]), torch.ones(3)])
def test_near_refuses_nan_and_other_shapes(value):
    check = c.near([torch.ones(2)], 1e-5, apart=["dense"])
    with pytest.raises(c.WrongResult, match="peer, output 0"):
        check({"peer": [value]})
    check({"dense": [torch.zeros(7)]})  # other inputs
    with pytest.raises(c.WrongResult, match="dense: NaN"):
        check({"dense": [torch.tensor(float("nan"))]})


def test_a_peer_that_cannot_run_is_shown_with_its_reason():
    def fails():
        raise RuntimeError("no kernel\nfor this")

    rows = measure(case(peer=lambda: 2, broken=fails))
    assert [row.who for row in rows] == [c.OURS, "peer", "Liger", "broken"]
    assert rows[3].reason == "fails: no kernel for this" and rows[3].ratio is None
    assert rows[2].reason == "needs a CUDA GPU"
    text = c.show(rows)
    assert "broken: not run, fails: no kernel" in text and "op, T=4, float32" in text


def test_our_own_failure_is_no_reason():
    def fails():
        raise RuntimeError("broken")

    runs = {c.OURS: fails, "peer": lambda: 1}
    broken = c.Case("op", {}, "float32", lambda: c.Candidates(runs, lambda outputs: None))
    with pytest.raises(RuntimeError, match="broken"):
        measure(broken)


def test_rows_know_their_floor():
    machine = Machine(1e9, 1e9, {"float32": 1e9})
    ours, peer = measure(case(peer=lambda: 2, work=Work(1e3, 10.0)), machine)[:2]
    assert ours.floor_seconds == 1e-6
    assert ours.share_of_floor == pytest.approx(1e-6 / ours.seconds.median)
    assert ours.ratio.median == 1.0 and peer.baseline == c.OURS


def test_inputs_are_the_same_in_every_run():
    drawn = []

    def prepare():
        drawn.append(torch.rand(1).item())
        return c.Candidates({c.OURS: lambda: 1}, lambda outputs: None)

    for _ in range(2):
        measure(c.Case("op", {}, "float32", prepare))
    assert drawn[0] == drawn[1]
