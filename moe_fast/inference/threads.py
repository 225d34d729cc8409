"""How many threads and processes there can be."""

from __future__ import annotations

import os
from typing import Any

from moe_fast.ops.checks import check_count

_PER_PROCESSOR = 4


def check_threads(name: str, value: Any) -> None:
    """Raise unless `value` is a number of threads or processes that this machine could run.

    More than a few per processor only slow each other down, and PyTorch ends with a signal where
    the system refuses it a thread.

    Raises:
        TypeError, ValueError: naming `name`, what it is and what is allowed.
    """
    check_count(name, value)
    most = _PER_PROCESSOR * (os.cpu_count() or 1)
    if value > most:
        raise ValueError(
            f"{name} must be at most {most}, {_PER_PROCESSOR} per processor; got {value}"
        )
