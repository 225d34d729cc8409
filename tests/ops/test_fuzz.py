"""Some cases of ``make fuzz``, with a seed of its own, and that it would notice."""

from __future__ import annotations

import pytest
import torch

from . import fuzz
from .fuzz_problems import SUBJECTS, Subject
from .helpers import need_native_library

need_native_library()


def test_finds_nothing():
    counts = fuzz.fuzz(4, range(300))
    assert counts["problems"] > 100
    assert counts["nonsense"] > counts["refused"] > 20
    assert min(counts[name] for name in SUBJECTS) > 3


@pytest.mark.parametrize("name", SUBJECTS)
def test_notices_a_wrong_result(monkeypatch, name):
    right = SUBJECTS[name]

    def wrong(arguments, native):
        *results, last = right.run(arguments, native)
        return [*results, last + (1 if native else 0)]

    monkeypatch.setattr(fuzz, "SUBJECTS", {name: Subject(right.draw, wrong)})
    with pytest.raises(AssertionError, match=rf"seed 1, case \d+, {name}: output \d: error"):
        fuzz.fuzz(1, range(100))


def test_a_run_repeats(monkeypatch):
    def numbers(arguments):
        return [v for v in arguments.values() if isinstance(v, torch.Tensor)]

    drawn: list[list[list[torch.Tensor]]] = [[], []]
    for run in drawn:
        keep = lambda _, a, rng=None, run=run: run.append(numbers(a)) or 0  # noqa: E731
        monkeypatch.setattr(fuzz, "check_right", keep)
        monkeypatch.setattr(fuzz, "check_survives", keep)
        fuzz.fuzz(7, range(20))
    assert len(drawn[0]) == 20
    for first, second in zip(*drawn, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
