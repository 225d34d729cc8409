"""No value, however large, deep or strange, makes a message long or moves a terminal's cursor."""

from __future__ import annotations

import pytest

from moe_fast.messages import listed, nearest, reason, shown


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        "\x1b[31mred\u202e\n",
        b"\0" * 10**6,
        ["x" * 10**6] * 100,
        {str(n): n for n in range(10**5)},
        10**5000,
    ],
    ids=["text", "control characters", "bytes", "list", "mapping", "number"],
)
def test_a_shown_value_is_short_and_has_no_control_characters(value):
    said = shown(value)
    assert len(said) < 100 and said.isprintable()


def test_a_value_nested_without_end_is_shown():
    value: list = []
    value.append(value)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(value)) < 100 and len(shown(deep)) < 100


def test_names_are_cut_and_counted():
    said = listed([f"column\n{n}" for n in range(60_000)])
    assert said.startswith(r"['column\n0', ") and said.endswith(", ... 60,000 in all]")
    assert len(said) < 500 and listed(["a", "b"]) == "['a', 'b']"


def test_an_error_of_another_library_is_one_short_line():
    said = reason(ValueError("broken\n\t at \x1b[2J " + "x" * 10**6))
    assert said.startswith(r"broken at \x1b[2J xxx") and len(said) < 320 and said.isprintable()


def test_the_nearest_name():
    assert nearest("Domian", ["label", "domain"]) == "domain"
    assert nearest("x", ["label", "domain"]) is None
    assert nearest("domain" * 100, ["domain"]) is None
