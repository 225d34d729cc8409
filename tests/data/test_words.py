"""Words of every script, and what makes two spellings one word."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.data.words import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C or R? 5!", ["c", "or", "r", "5"]),
        ("snake_case don't", ["snake_case", "don", "t"]),
        ("naïve Straße", ["naïve", "strasse"]),
        ("机器学习", ["机器", "器学", "学习"]),
        ("猫", ["猫"]),
        ("日本語。中国", ["日本", "本語", "中国"]),
        ("東京タワーのABC", ["東京", "京タ", "タワ", "ワー", "ーの", "abc"]),
        ("한국어 말", ["한국", "국어", "말"]),
        ("ไทย 5", ["ไท", "ทย", "5"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("Ｃ＃ ﾊﾟﾝ", ["c", "パン"]),
        ("", []),
        ("?! 。", []),
    ],
)
def test_words(text: str, expected: list[str]):
    assert words(text) == [unicodedata.normalize("NFKC", word) for word in expected]


@given(st.text())
def test_every_letter_and_digit_is_in_a_word(text: str):
    plain = unicodedata.normalize("NFKC", text).casefold()
    assert {c for word in words(text) for c in word} >= {c for c in plain if c.isalnum()}


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_taken_apart_as_other_text_is(text: str):
    assert words(f"{text} é") == [*words(text), "é"]
