"""The command line, ``moe-fast``: each command parses, calls the library and prints.

One command per file; what they share is in :mod:`moe_fast.cli.command`. What a command needs is
loaded when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``moe-fast``; ends with ``SystemExit``.

    Args:
        arguments: the words after ``moe-fast``; ``None``: those of the process.

    Raises:
        SystemExit: always. Code 0: done; 1: it failed, the reason is on stderr; 2: wrong usage.
    """
    from moe_fast.cli.app import app

    app(args=None if arguments is None else list(arguments), prog_name="moe-fast")
