"""Formats values, names and other libraries' errors for messages: short, on one line, escaped.

Text from a file or from an unknown model appears in messages only through these functions. So no
message is megabytes long, and no control character reaches a terminal.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

SHOWN_NAMES = 20
_LONGEST_NAME = 100  # characters; for longer names no near spelling is searched


def shown(value: Any, length: int = 60) -> str:
    """Return ``repr`` of a value, with control characters escaped, cut to about ``length``.

    Values that are too large for that are described by their type.
    """
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = length
    brief.maxlevel = 3
    try:
        text = brief.repr(value[: 2 * length] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # such as an int with thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= length + 20 else f"{text[:length]}..."


def reason(error: BaseException, length: int = 300) -> str:
    """Return the message of another library's error on one line, escaped and cut to ``length``."""
    text = " ".join(str(error)[: 2 * length].split())
    text = printable(text)
    return text if len(text) <= length else f"{text[:length]}..."


def printable(text: str) -> str:
    """Return the text with its control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Collection[Any], most: int = SHOWN_NAMES) -> str:
    """Return names as a list for a message; a list cut after ``most`` names tells their number."""
    first = [shown(name) for _, name in zip(range(most), names, strict=False)]
    more = f", ... {len(names):,} in all" if len(names) > most else ""
    return f"[{', '.join(first)}{more}]"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` probably means, or None."""
    if len(name) > _LONGEST_NAME:
        return None
    plain = {simplified(other): other for other in known if len(other) <= _LONGEST_NAME}
    near = difflib.get_close_matches(simplified(name), plain, n=1, cutoff=0.75)
    return plain[near[0]] if near else None


def simplified(name: str) -> str:
    """Return a form that all spellings of a name share: ``Not-Duplicate`` is ``not_duplicate``."""
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())
