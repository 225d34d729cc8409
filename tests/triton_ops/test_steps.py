"""The table of what each step changed in the machine code: the page's is the committed one."""

from __future__ import annotations

import pytest

from bench import triton_steps

from .processes import ROOT


def test_the_page_shows_the_committed_figures():
    page = (ROOT / "docs" / "kernels.md").read_text()
    shown = page[page.index("<!-- steps -->\n") : page.index("<!-- /steps -->")]
    assert shown.removeprefix("<!-- steps -->\n").strip("\n") == triton_steps.table().strip("\n")


@pytest.mark.parametrize(
    ("registers", "shared_memory", "warps", "fit"),
    [
        (128, 98_304, 8, 2),
        (129, 98_304, 8, 1),  # registers are given to warps in units of 256
        (128, 147_456, 8, 1),
        (255, 98_304, 8, 1),
        (32, 0, 8, 8),
    ],
)
def test_programs_per_multiprocessor(registers, shared_memory, warps, fit):
    assert triton_steps.programs(registers, shared_memory, warps) == fit
