"""Checks numbers of threads and processes."""

from __future__ import annotations

import os
from typing import Any

from moe_fast.ops.checks import check_count

_PER_PROCESSOR = 4


def check_threads(name: str, value: Any) -> None:
    """Raise an error unless this machine can run `value` threads or processes.

    More than a few per processor only slow each other down. With far more, the system refuses to
    start a thread, and PyTorch is killed by a signal.

    Raises:
        TypeError: `value` is not an int.
        ValueError: `value` is below 1, or above 4 per processor.
    """
    check_count(name, value)
    most = _PER_PROCESSOR * (os.cpu_count() or 1)
    if value > most:
        raise ValueError(
            f"{name} must be at most {most}, {_PER_PROCESSOR} per processor; got {value}"
        )
