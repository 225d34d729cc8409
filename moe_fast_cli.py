"""``moe-fast``, the program: help and wrong usage are answered before torch and transformers load.

Importing any module of moe_fast first runs ``moe_fast/__init__.py``, which loads both to register
the architectures. Here the package is known from the start, and run when a command begins.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run ``moe-fast``; see :func:`moe_fast.cli.main`."""
    spec = importlib.util.find_spec("moe_fast")
    if spec is None:
        sys.exit("moe-fast: error: the package moe_fast is not installed")
    sys.modules["moe_fast"] = importlib.util.module_from_spec(spec)

    from moe_fast.cli import main as run

    run()


if __name__ == "__main__":
    main()
