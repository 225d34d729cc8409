"""Checks the values of a row, and says in the error what a value must be.

Every check takes the value, its column and its place (file and line), and gives the value back.
Values and names from a file stand in messages through `moe_fast.messages` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_fast.messages import listed, nearest, shown, simplified

# What a label says by its name, in the words of common datasets (GLUE, NLI, BEIR).
POSITIVE = {"1", "1.0", "true", "positive", "entailment", "duplicate", "equivalent"}
POSITIVE |= {"paraphrase", "relevant"}
NEGATIVE = {"0", "0.0", "false", "negative", "contradiction", "not_entailment", "not_duplicate"}
NEGATIVE |= {"not_equivalent", "not_paraphrase", "not_relevant", "irrelevant"}

_LONGEST_LABEL = 100  # characters


def text(value: Any, name: str, where: str) -> str:
    """A string that is more than white space."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {_typed(value)}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    return _unicode(value, name, where)


def texts(value: Any, name: str, where: str, *, allow_none: bool = False) -> list[str]:
    """A list of strings, at least one unless `allow_none`; a string is a list of one."""
    if isinstance(value, str):
        return [text(value, name, where)]
    items = _each(text, value, name, where)
    if not items and not allow_none:
        raise ValueError(f"{where}: {name} is an empty list")
    return items


def identifier(value: Any, name: str, where: str) -> str:
    """An id: a string that is not empty, or a whole number, given back as a string."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{where}: {name}={shown(value)} does not fit 64 bits")
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text or a whole number, got {_typed(value)}")
    return text(value, name, where)


def identifiers(value: Any, name: str, where: str) -> list[str]:
    """A list of ids, maybe empty."""
    return _each(identifier, value, name, where)


def number(value: Any, name: str, where: str) -> float:
    """A finite number, or a string that spells one, as in CSV."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: {name} must be a number, got {_typed(value)}") from None
    if not math.isfinite(result):
        raise ValueError(f"{where}: {name} must be finite, got {shown(value)}")
    return result


def numbers(value: Any, name: str, where: str) -> list[float]:
    """A list of finite numbers."""
    return _each(number, value, name, where)


def label(value: Any, name: str, where: str) -> int:
    """1 or 0, of two texts that belong together or not.

    Args:
        value: a number or truth value that is 0 or 1, or a text that says so: a number, "true",
            or a name in `POSITIVE` or `NEGATIVE`. Of a class label this is its name, never its
            number: 0 is "entailment" in one dataset and "not_entailment" in another.
    """
    if isinstance(value, str):
        said = simplified(value) if len(value) <= _LONGEST_LABEL else ""
        if said in POSITIVE or said in NEGATIVE:
            return int(said in POSITIVE)
    elif isinstance(value, bool | int | float) and value in (0, 1):
        return int(value)
    raise ValueError(
        f"{where}: {name}={shown(value)}; allowed are 0 and 1, true and false, or a name that says "
        "as much, such as positive, negative, entailment, duplicate"
    )


def scalar(value: Any, name: str, where: str) -> str | bool | int | float:
    """A value of a column that is kept as it is: text, a number or a truth value."""
    if isinstance(value, str):
        return _unicode(value, name, where)
    if not isinstance(value, bool | int | float):
        raise ValueError(
            f"{where}: a column that is kept must hold text or numbers; {name} is {_typed(value)}"
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {name}={shown(value)} does not fit 64 bits")
    return value


def present(row: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Every one of `names` is a column of the row."""
    for name in names:
        if name not in row:
            near = nearest(name, list(row)[:1000])
            hint = f" (did you mean {shown(near)}?)" if near else ""
            raise ValueError(
                f"{where}: column {name!r} is missing{hint}; columns present: {listed(sorted(row))}"
            )


def _unicode(value: str, name: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, Arrow cannot
        raise ValueError(f"{where}: {name} is not valid Unicode ({error})") from error
    if "\0" in value:
        raise ValueError(f"{where}: {name} has a NUL character, which no text has; {shown(value)}")
    return value


def _each(check: Callable[[Any, str, str], Any], value: Any, name: str, where: str) -> list[Any]:
    """A list whose every item passes the check."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, got {_typed(value)}")
    return [check(item, f"{name}[{i}]", where) for i, item in enumerate(value)]


def _typed(value: Any) -> str:
    return f"{type(value).__name__} ({shown(value)})"
