"""What the readers' own tests do not reach: every kind of value, and that it is given back."""

from __future__ import annotations

import pytest

from moe_fast.data import checks


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (checks.text, " x ", " x "),
        (checks.texts, ["x", "y"], ["x", "y"]),
        (checks.number, 3, 3.0),
        (checks.number, " -1e3 ", -1000.0),
        (checks.numbers, [1, 0.5], [1.0, 0.5]),
        (checks.label, "1", 1),
        (checks.label, " 0", 0),
        (checks.label, 1.0, 1),
        (checks.label, False, 0),
        (checks.label, "0.0", 0),
        (checks.label, "TRUE", 1),
        (checks.label, "Entailment", 1),
        (checks.label, "not-duplicate", 0),
        (checks.identifier, 7, "7"),
        (checks.identifier, "07", "07"),
        (checks.identifiers, [1, "b"], ["1", "b"]),
        (checks.texts, "x", ["x"]),
        (checks.scalar, "", ""),
        (checks.scalar, True, True),
        (checks.scalar, -(2**63), -(2**63)),
    ],
)
def test_what_is_allowed_is_given_back(check, value, expected):
    result = check(value, "x", "f, line 1")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (checks.text, b"x"),
        (checks.text, "\t\n"),
        (checks.text, "\udc80"),
        (checks.texts, ("x",)),
        (checks.number, None),
        (checks.number, [1]),
        (checks.number, 10**400),
        (checks.number, "-inf"),
        (checks.numbers, 1.0),
        (checks.label, None),
        (checks.label, "neutral"),
        (checks.label, "yes"),
        (checks.label, "1" + " " * 200),
        (checks.label, 0.5),
        (checks.identifier, True),
        (checks.identifier, 1.0),
        (checks.identifier, 2**64),
        (checks.identifiers, "x"),
        (checks.label, -1),
        (checks.label, [1]),
        (checks.scalar, "\ud800"),
        (checks.scalar, {"a": 1}),
    ],
)
def test_what_is_not_names_the_column_and_the_place(check, value):
    with pytest.raises(ValueError, match=r"^f, line 7: .*\bsize\b"):
        check(value, "size", "f, line 7")


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(ValueError) as error:
        checks.text(list(range(10_000)), "x", "f")
    assert len(str(error.value)) < 150


def test_a_missing_column_names_the_nearest_present():
    with pytest.raises(ValueError, match=r"column 'text' is missing \(did you mean 'Text'\?\)"):
        checks.present({"Text": "x", "id": 1}, ["text"], "f, line 1")
