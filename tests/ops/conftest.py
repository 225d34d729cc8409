"""Settings of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    """Every test draws the same numbers, and finds NaN in all memory that nobody wrote.

    Deterministic mode makes ``torch.empty`` and its kin fill what they return: rows that an op
    forgets to write, or reads before writing, then show in every run and not once in a while.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
