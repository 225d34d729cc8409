"""Fresh processes: TRITON_INTERPRET is read when the kernels are decorated."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """``python ARGUMENTS`` in the repository's root; a variable that is ``None`` is unset."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env.update({n: v for n, v in environment.items() if v is not None})
    for name in [n for n, v in environment.items() if v is None]:
        env.pop(name, None)
    # The interpreted run is no worker of this one.
    for name in [n for n in env if n.startswith("PYTEST_")]:
        env.pop(name)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
