"""What a value of a row must be, and the message where it is something else.

Every function takes the value, its column and its place (file and line), and gives the value back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def text(value: Any, name: str, where: str) -> str:
    """A string that is more than white space."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {_shown(value)}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    return _unicode(value, name, where)


def texts(value: Any, name: str, where: str, *, allow_none: bool = False) -> list[str]:
    """A list of strings, at least one unless `allow_none`."""
    items = _items(value, name, where)
    if not items and not allow_none:
        raise ValueError(f"{where}: {name} is an empty list")
    return [text(item, f"{name}[{i}]", where) for i, item in enumerate(items)]


def number(value: Any, name: str, where: str) -> float:
    """A finite number, or a string that spells one, as in CSV."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {name} must be a number, got {_shown(value)}") from None
    if not math.isfinite(result):
        raise ValueError(f"{where}: {name} must be finite, got {value}")
    return result


def numbers(value: Any, name: str, where: str) -> list[float]:
    """A list of finite numbers."""
    items = _items(value, name, where)
    return [number(item, f"{name}[{i}]", where) for i, item in enumerate(items)]


def label(value: Any, name: str, where: str) -> int:
    """0 or 1, as a number or as a string."""
    if isinstance(value, str):
        if value.strip() in ("0", "1"):
            return int(value)
    elif not isinstance(value, bool) and value in (0, 1):
        return int(value)
    raise ValueError(f"{where}: {name}={value!r}; allowed are 0 and 1")


def scalar(value: Any, name: str, where: str) -> str | bool | int | float:
    """A value of a column that is kept as it is: text, a number or a truth value."""
    if isinstance(value, str):
        return _unicode(value, name, where)
    if not isinstance(value, bool | int | float):
        raise ValueError(
            f"{where}: a column that is kept must hold text or numbers; {name} is {_shown(value)}"
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {name}={value} does not fit 64 bits")
    return value


def present(row: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Every one of `names` is a column of the row."""
    for name in names:
        if name not in row:
            raise ValueError(f"{where}: column {name!r} is missing; columns present: {sorted(row)}")


def _unicode(value: str, name: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, Arrow cannot
        raise ValueError(f"{where}: {name} is not valid Unicode ({error})") from error
    return value


def _items(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} ({shown if len(shown) <= 80 else shown[:77] + '...'})"
