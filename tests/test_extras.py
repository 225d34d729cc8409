"""What is said where an extra's library is missing, and how people are told to install moe_fast."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import moe_fast
from moe_fast.extras import require
from moe_fast.version import install_command

ROOT = Path(moe_fast.__file__).parents[1]


def test_what_is_there_is_imported():
    assert require("json.decoder", "train", "this") is sys.modules["json.decoder"]


def test_what_is_missing_is_named_by_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError) as raised:
        require("faiss", "search", "this search")
    assert str(raised.value) == (
        "this search needs faiss-cpu, which is not installed: "
        "pip install -e '.[search]' (in a checkout of moe_fast)"
    )


def test_a_library_that_lacks_another_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="half-there, which cannot be imported .*nowhere_to_be"):
        require("half_there", "train", "this")


def test_install_command():
    assert install_command() == "pip install -e . (in a checkout of moe_fast)"


def test_nothing_sends_people_to_an_index_that_lacks_moe_fast():
    files = [*(ROOT / "moe_fast").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    told = [path for path in files if re.search(r"pip install\W+moe.fast", path.read_text())]
    assert told == []
