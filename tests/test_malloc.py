"""malloc_trim: glibc's, where there is one."""

import sys

import pytest

from moe_fast import malloc


def test_there_is_none_elsewhere(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert malloc.malloc_trim() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_it_can_be_called_again_and_again():
    trim = malloc.malloc_trim()
    if trim is None:
        pytest.skip("this system has another C library")
    assert {trim(0), trim(0)} <= {0, 1}
