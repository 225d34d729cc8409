"""Values, names and other libraries' errors as messages show them: short, on one line, escaped.

Text from a file or a stranger's model stands in a message only through these functions, so that no
message is megabytes long and none moves a terminal's cursor.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

SHOWN_NAMES = 20
_LONGEST_NAME = 100  # characters, to look for a spelling that is near


def shown(value: Any, length: int = 60) -> str:
    """A value for a message: ``repr``, so that control characters are escaped, cut to `length`."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = length
    brief.maxlevel = 3
    try:
        text = brief.repr(value[: 2 * length] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= length + 20 else f"{text[:length]}..."


def reason(error: BaseException, length: int = 300) -> str:
    """What an error of another library says, on one line, escaped and cut."""
    text = " ".join(str(error)[: 2 * length].split())
    text = printable(text)
    return text if len(text) <= length else f"{text[:length]}..."


def printable(text: str) -> str:
    """Text whose control characters are escaped: none reaches a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Collection[Any], most: int = SHOWN_NAMES) -> str:
    """Names for a message, as a list that is cut after `most`, with how many there are."""
    first = [shown(name) for _, name in zip(range(most), names, strict=False)]
    more = f", ... {len(names):,} in all" if len(names) > most else ""
    return f"[{', '.join(first)}{more}]"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None."""
    if len(name) > _LONGEST_NAME:
        return None
    plain = {simplified(other): other for other in known if len(other) <= _LONGEST_NAME}
    near = difflib.get_close_matches(simplified(name), plain, n=1, cutoff=0.75)
    return plain[near[0]] if near else None


def simplified(name: str) -> str:
    """What spellings of one name have in common: ``Not-Duplicate`` is ``not_duplicate``."""
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())
