"""The lowest floor: the Triton kernels take arrays and give arrays, and import nothing of moe_fast.

import-linter does not see them, for they lie outside of moe_fast/ in a checkout.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))


def imports_of_moe_fast(source: str, depth: int) -> list[str]:
    """What a file of the kernels imports of moe_fast, at any place in it.

    Args:
        source: the file's text.
        depth: how many folders below kernels/ it lies; a relative import that climbs higher is in
            moe_fast, once installed.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = "moe_fast" if node.level > depth else "." * node.level
            names.append(f"{above}.{node.module}" if node.level else str(node.module))
        elif isinstance(node, ast.Call):  # importlib.import_module("moe_fast.ops") and the like
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                names += [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
    return [name for name in names if name.partition(".")[0] == "moe_fast"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kernels_know_nothing_of_moe_fast(file: Path) -> None:
    depth = len(file.relative_to(KERNELS).parent.parts)
    assert not imports_of_moe_fast(file.read_text("utf-8"), depth)


@pytest.mark.parametrize(
    "line",
    [
        "import moe_fast.ops",
        "from moe_fast import ops",
        "from .. import ops",
        "from ..ops.plan import plan",
        "def late():\n    from moe_fast.compat import is_compiled",
        "importlib.import_module('moe_fast.ops')",
    ],
)
def test_an_import_of_moe_fast_would_be_found(line: str) -> None:
    assert imports_of_moe_fast(line, depth=1)


def test_their_own_modules_and_other_libraries_are_none() -> None:
    assert len(FILES) > 10
    assert not imports_of_moe_fast("import torch\nfrom .config import x\nfrom . import y", depth=1)
