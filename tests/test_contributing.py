"""CONTRIBUTING names files that are there, and no more of them than it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAMED = sorted(
    set(re.findall(r"`((?:moe_fast|kernels|tests|bench|docs|\.github)/?[\w/.<>-]*)`", TEXT))
)
MOST_FILES = {"activation": 4, "backend": 3, "encoder": 2, "loss": 3, "command": 2}


@pytest.mark.parametrize("name", NAMED)
def test_named_files_are_there(name):
    pattern = re.sub(r"<\w+>", "*", name)  # moe_fast/ops/<op>/<backend>.py stands for many
    assert any(ROOT.glob(pattern)), f"CONTRIBUTING.md names {name}, and there is no such file"


@pytest.mark.parametrize("kind", MOST_FILES)
def test_no_change_takes_more_files_than_it_may(kind):
    (section,) = re.findall(rf"^### An? {kind}\b.*?(?=^### )", TEXT, re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    assert 1 <= len(files) <= MOST_FILES[kind]


def test_ten_changes_are_listed():
    table = TEXT.split("### Ten changes")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| .* \| `[^`]+` \|$", table, re.MULTILINE)) == 10


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
