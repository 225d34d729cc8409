"""A pytest plugin: every mixture's rows are sorted and padded, to multiples of 32 here."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fast.triton_ops import launch_config, padded_plan

    monkeypatch.setattr(padded_plan, "PAD_ROWS", 32)
    monkeypatch.setattr(launch_config, "pads_experts", lambda like, rows, experts: experts > 0)
