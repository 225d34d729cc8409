"""Settings for all tests."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

# Examples may be slow on a busy machine; in CI the same ones are drawn every time.
settings.register_profile("moe_fast", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("moe_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first: at the end, all but one of several processes would wait."""
    items.sort(key=lambda item: "triton_ops" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Freeze what the test files imported."""
    _freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Freeze what the tests of a file imported."""
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Libraries stay: each collection of garbage, one per training, would look at all of them."""
    gc.collect()
    gc.freeze()
