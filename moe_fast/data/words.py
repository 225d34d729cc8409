"""Splits a text into words, in any script, for searches and filters by words.

A word is a run of letters, digits, underscores and the marks upon them, however short: "C" and "5"
are words. Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
give the pairs of neighbouring characters of a run, and a single character itself, as Lucene's
CJKAnalyzer does (which takes Korean so as well). Full-width and half-width forms are one (NFKC), as
are capitals and small letters.
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
    """The words of a text in their order, casefolded."""
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
    r"""Runs of what words are made of: Python's ``\w`` has letters without the marks upon them."""
    last = 0x1FFFF  # planes 0 and 1; all marks beyond select a variant of a character
    marks = "".join(c for c in map(chr, range(last)) if unicodedata.category(c)[0] == "M")
    return re.compile(rf"[\w{marks}]+")
