"""Twenty seconds of ``make fuzz``, with a seed of its own, and that it would notice."""

from __future__ import annotations

import pytest
import torch

from . import fuzz
from .helpers import need_native_library

need_native_library()


def test_finds_nothing():
    counts = fuzz.fuzz(seconds=20, seed=4)
    assert counts["problems"] > 20
    assert counts["nonsense"] > counts["refused"] > 10


def test_notices_a_wrong_result(monkeypatch):
    right = fuzz.forward_backward

    def wrong(arguments, upstream, native):
        results = right(arguments, upstream, native)
        return [results[0] * (1.1 if native else 1.0), *results[1:]]

    monkeypatch.setattr(fuzz, "forward_backward", wrong)
    with pytest.raises(AssertionError, match=r"seed 1, case \d+: output 0"):
        fuzz.fuzz(seconds=20, seed=1)


def test_a_run_repeats(monkeypatch):
    drawn: list[list[torch.Tensor]] = [[], []]
    for run in drawn:
        monkeypatch.setattr(fuzz, "check_right", lambda a, run=run: run.append(a["x"]))
        monkeypatch.setattr(fuzz, "check_survives", lambda a, rng, run=run: run.append(a["x"]) or 0)
        fuzz.fuzz(seconds=0.5, seed=7)
    assert min(map(len, drawn)) > 3
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=False))
