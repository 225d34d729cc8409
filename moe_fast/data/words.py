"""Splits a text into words, in any script, for searches and filters by words.

A word is a run of letters, digits, underscores and combining marks of any length: "C" and "5" are
words. In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
and in Korean the words are all pairs of neighbouring characters of a run; a run of one character is
a word. Lucene's CJKAnalyzer does the same for Chinese, Japanese and Korean. Full-width and
half-width forms (NFKC) and upper and lower case are not distinguished.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import pairwise

# Blocks of the scripts without spaces, and of Hangul, whose words carry their particles.
_DENSE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\u1100-\u11ff\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b\u303c\u3041-\u30ff\u3105-\u312f"
    "\u3131-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_ASCII_WORDS = re.compile(r"[a-z0-9_]+")
_PARTS = re.compile(rf"(?P<dense>[{_DENSE}]+)|[^{_DENSE}]+")


def words(text: str) -> list[str]:
    """Return the words of a text in their order, casefolded."""
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    found: list[str] = []
    for run in _runs().findall(unicodedata.normalize("NFKC", text).casefold()):
        for part in _PARTS.finditer(run):
            if part.lastgroup == "dense" and len(part.group()) > 1:
                found.extend(map("".join, pairwise(part.group())))
            else:
                found.append(part.group())
    return found


@cache
def _runs() -> re.Pattern[str]:
    r"""A pattern for runs of word characters and combining marks, which ``\w`` alone excludes."""
    last = 0x1FFFF  # planes 0 and 1; all marks beyond them only select a variant of a character
    marks = "".join(c for c in map(chr, range(last)) if unicodedata.category(c)[0] == "M")
    return re.compile(rf"[\w{marks}]+")
