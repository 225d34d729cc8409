"""The committed table of what the kernels use, compiled again: ``make test-kernels``, minutes."""

from __future__ import annotations

import json
import os

import pytest

from bench import triton_resources as resources

from .processes import needs_triton
from .test_resources import TABLE


@needs_triton
@pytest.mark.slow
def test_the_committed_table_is_what_the_kernels_compile_to(tmp_path, monkeypatch):
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    committed = json.loads(TABLE.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is Triton {committed['triton']}'s, here is {triton.__version__}")
    found, wrong = resources.measure(
        resources.TARGETS, list(resources.PROBLEMS), workers=os.cpu_count() or 1
    )
    assert not wrong
    assert found == committed["resources"]
