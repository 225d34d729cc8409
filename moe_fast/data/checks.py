"""Checks the values of a row; the error says what a value must be.

Every check takes a value, the name of its column and its place (file and line). It returns the
value, or raises ValueError. Values and names that come from a file are put into messages by
`moe_fast.messages` only, which shortens and escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_fast.messages import listed, nearest, shown, simplified

# Names that common datasets (GLUE, NLI, BEIR) give to the labels 1 and 0.
POSITIVE = {"1", "1.0", "true", "positive", "entailment", "duplicate", "equivalent"}
POSITIVE |= {"paraphrase", "relevant"}
NEGATIVE = {"0", "0.0", "false", "negative", "contradiction", "not_entailment", "not_duplicate"}
NEGATIVE |= {"not_equivalent", "not_paraphrase", "not_relevant", "irrelevant"}

_LONGEST_LABEL = 100  # characters


def text(value: Any, name: str, where: str) -> str:
    """Check that the value is a string with more than white space in it."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {_typed(value)}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    return _unicode(value, name, where)


def texts(value: Any, name: str, where: str, *, allow_none: bool = False) -> list[str]:
    """Check a list of texts, which may be empty if `allow_none`; a string becomes a list of one."""
    if isinstance(value, str):
        return [text(value, name, where)]
    items = _each(text, value, name, where)
    if not items and not allow_none:
        raise ValueError(f"{where}: {name} is an empty list")
    return items


def identifier(value: Any, name: str, where: str) -> str:
    """Check an id, a string that is not empty or a whole number; return it as a string."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{where}: {name}={shown(value)} does not fit 64 bits")
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text or a whole number, got {_typed(value)}")
    return text(value, name, where)


def identifiers(value: Any, name: str, where: str) -> list[str]:
    """Check a list of ids, which may be empty; return them as strings."""
    return _each(identifier, value, name, where)


def number(value: Any, name: str, where: str) -> float:
    """Check a finite number, which may be a string as in CSV; return it as a float."""
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
    """Check a list of finite numbers; return them as floats."""
    return _each(number, value, name, where)


def label(value: Any, name: str, where: str) -> int:
    """Convert the label of a pair to 1 (the texts belong together) or 0 (they do not).

    Args:
        value: the number 0 or 1, a truth value, or one of the names in `POSITIVE` and `NEGATIVE`,
            such as "true" or "not_entailment". The class labels of a dataset must be given by
            their names, because their numbers differ: 0 is "entailment" in one dataset and
            "not_entailment" in another.

    Raises:
        ValueError: any other value.
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
    """Check a value of a column that is kept unchanged: text, a number or a truth value."""
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
    """Raise ValueError unless every one of `names` is a column of the row."""
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
    """Check every item of a list; return the list of the results."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, got {_typed(value)}")
    return [check(item, f"{name}[{i}]", where) for i, item in enumerate(value)]


def _typed(value: Any) -> str:
    return f"{type(value).__name__} ({shown(value)})"
