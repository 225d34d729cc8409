"""bench.instructions: callgrind's totals; a real count (slow)."""

from __future__ import annotations

import shutil

import pytest

from bench import instructions
from moe_fast.ops import native


def test_the_total_of_a_callgrind_file():
    assert instructions.instructions("events: Ir\nfn=(1) f\n1 20\n\ntotals: 4711\n") == 4711
    assert instructions.instructions("summary: 12 0\n1 3\n") == 12


@pytest.mark.parametrize("dump", ["", "totals: 0\n"])
def test_counting_nothing_is_an_error(dump):
    with pytest.raises(RuntimeError, match="counted nothing"):
        instructions.instructions(dump)


def test_without_valgrind_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert instructions.main([]) == 1
    assert "valgrind is not installed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(native.why_no_products("cpu") is not None, reason="needs the native library")
def test_products_are_most_of_the_instructions():
    counts = {name: instructions.count(name) for name in instructions.FUNCTIONS}
    s = instructions.SHAPE
    flop = 4 * s["T"] * s["K"] * s["D"] * s["H"]
    # Eight lanes of multiply-and-add at best; several times that would be a plain loop.
    assert flop / 16 < counts["expert_mlp"] < flop
    # Twice the forward's products; the forward also packs the weights for them.
    assert 1.5 < counts["expert_mlp_backward"] / counts["expert_mlp"] < 5
    assert counts["plan"] < 100 * s["T"] * s["K"]
