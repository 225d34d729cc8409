"""Tokenizes texts, and in the same pass measures, cuts and counts those that are too long."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_fast.encoding.tokenizers import own_tokenizer

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 1 << 20
# Only a part of a text with more characters than this per token of the limit is read at first.
_CHARACTERS_PER_TOKEN = 64
_LEAST_CHARACTERS = 8192
_NO_LIMIT = 10**9  # tokenizers without a limit state 10**30
_SHOWN = 60
# Near a cut through a text, tokens may differ from those of the whole text; so many are not used.
_MARGIN = 64
# The factor by which a part with too few tokens grows; these are rare, such as blanks or one word.
_GROWTH = 16
# A text with too few tokens in this many characters, or in a part that grew once, is read no
# further: a tokenizer would take a second and 150 MB for each million characters.
_MOST_CHARACTERS = 1 << 20

Ids = NDArray[np.int32]


class TokenizedText(NamedTuple):
    """A text as token ids, special tokens included.

    sentence-transformers sorts texts by length; the length of a tuple is the sum of its parts'.

    Attributes:
        ids: [n] int32.
        type_ids: [n] int32, or ``None`` if the model takes none.
        place: the text's index among the caller's texts.
    """

    ids: Ids
    type_ids: Ids | None
    place: int


@dataclass
class LongTexts:
    """The texts of a call that have more tokens than the limit.

    Attributes:
        limit: the most tokens that a text may have; ``None``: any number.
        num_texts: the number of texts.
        num_long: how many of them are too long.
        first: the first long text: its index, its number of tokens as text (a very long text is
            not read to its end) and its beginning, including the prompt.
        pieces: by index, the parts that were read of texts that were not read as a whole.
    """

    limit: int | None
    num_texts: int
    num_long: int = 0
    first: tuple[int, str, str] | None = None
    pieces: dict[int, str] = field(default_factory=dict)

    def settle(self, truncate: bool | None) -> None:
        """Warn how many texts are cut, or raise ``ValueError`` if they must not be cut."""
        if self.first is None:
            return
        if truncate:
            _report(self)
            return
        index, length, start = self.first
        raise ValueError(
            f"texts must have at most max_seq_length = {self.limit} tokens each; text {index} has "
            f"{length} ({self.num_long} of {self.num_texts} texts are too long): {start!r}. Pass "
            "truncate=True to cut them."
        )


def measure_texts(
    tokenizer: Any, texts: Sequence[str], prompt: str, limit: int | None
) -> LongTexts:
    """Find the texts that have more than ``limit`` tokens, including the prompt."""
    long = LongTexts(limit, len(texts))
    if limit is not None and tokenizer is not None:
        for _ in _tokenized(tokenizer, texts, prompt, long):
            pass
    return long


def tokenize_texts(
    tokenizer: Any, texts: Sequence[str], prompt: str, limit: int | None
) -> tuple[list[TokenizedText], LongTexts]:
    """Tokenize texts after their prompt, and cut long ones to ``limit`` tokens.

    The ids are those of ``tokenizer(prompt + text, truncation=True, max_length=limit)``; the
    tokenizer's own state does not change. Only a part of a very long text is read, which surely
    contains these tokens, or has a million characters: if it has fewer tokens, the text counts as
    too long.
    """
    long = LongTexts(limit, len(texts))
    return list(_tokenized(tokenizer, texts, prompt, long)), long


def prompt_length(tokenizer: Any, prompt: str, limit: int | None) -> int:
    """The number of a prompt's tokens, as sentence-transformers counts them.

    A special token at its end does not count. Poolings that exclude the prompt skip as many tokens.
    """
    (tokenized,), _ = tokenize_texts(tokenizer, [prompt], "", limit)
    ends_special = int(tokenized.ids[-1]) in tokenizer.all_special_ids
    return len(tokenized.ids) - ends_special


def shortened(texts: Sequence[str], prompt: str, long: LongTexts) -> list[str]:
    """Texts for a model that cuts them itself; very long ones are reduced to the part read."""
    texts = list(texts)
    for i, piece in long.pieces.items():
        texts[i] = piece.removeprefix(prompt)
    return texts


def _tokenized(
    tokenizer: Any, texts: Sequence[str], prompt: str, long: LongTexts
) -> Iterator[TokenizedText]:
    """Yield each text's tokens, in order, and record long texts in ``long``."""
    limit = long.limit
    reader = _Reader(own_tokenizer(tokenizer), limit)
    for start, chunk in _chunks(texts, prompt, reader.most_characters):
        pieces = [reader.piece(text, reader.most_characters) for text in chunk]
        for i, (ids, type_ids, length) in enumerate(reader.read(pieces), start):
            text, piece = chunk[i - start], pieces[i - start]
            size = reader.most_characters
            most = max(_MOST_CHARACTERS, _GROWTH * size)
            while len(piece) < len(text) and length <= reader.enough and size < most:
                size = min(_GROWTH * size, most)
                piece = reader.piece(text, size)
                ((ids, type_ids, length),) = reader.read([piece])
            whole = len(piece) == len(text)
            if not whole:
                long.pieces[i] = piece
            if limit is not None and (length > limit or not whole):
                long.num_long += 1
                said = f"{length}" if whole else f"more than {length - _MARGIN}"
                if length <= reader.enough and not whole:
                    said = f"{length} in {len(piece):,} characters, and is read no further"
                long.first = long.first or (i, said, text[:_SHOWN])
            yield TokenizedText(ids, type_ids, i)


def _chunks(
    texts: Sequence[str], prompt: str, most_characters: float
) -> Iterator[tuple[int, list[str]]]:
    """Yield (index of the first, texts after their prompt), few enough to be tokenized at once."""
    start, size = 0, 0.0
    chunk: list[str] = []
    for i, text in enumerate(texts):
        if chunk and (len(chunk) == _TEXTS_AT_ONCE or size > _CHARACTERS_AT_ONCE):
            yield start, chunk
            start, chunk, size = i, [], 0.0
        chunk.append(prompt + text)
        size += min(len(text), most_characters)
    if chunk:
        yield start, chunk


class _Reader:
    """A tokenizer that cuts texts at a limit and reports their number of tokens.

    Attributes:
        most_characters: of a longer text only a part is read at first.
        enough: if a part has more tokens than this, its first tokens are those of the whole text.
    """

    def __init__(self, tokenizer: Any, limit: int | None) -> None:
        self._tokenizer = tokenizer
        self._from_the_end = tokenizer.truncation_side == "left"
        self._options: dict[str, Any] = {"padding": False, "truncation": False, "verbose": False}
        self._cut = self._options | {"truncation": True, "max_length": limit}
        self._limit = math.inf if limit is None or limit >= _NO_LIMIT else limit
        self.enough = self._limit + _MARGIN
        self.most_characters = max(_CHARACTERS_PER_TOKEN * self._limit, _LEAST_CHARACTERS)

    def piece(self, text: str, size: float) -> str:
        """At most the first ``size`` characters (the last ones, if texts are cut from the left)."""
        if len(text) <= size:
            return text
        size = int(size)
        if self._from_the_end:
            space = re.search(r"\s", text[-size:][: size // 2])
            return text[-size:][space.start() if space else 0 :]
        space = re.search(r"\s", text[:size][: size // 2 : -1])
        return text[: size - space.end() if space else size]

    def read(self, pieces: list[str]) -> list[tuple[Ids, Ids | None, int]]:
        """(ids, type ids, number of tokens before they were cut) of each, cut at the limit."""
        is_fast = getattr(self._tokenizer, "is_fast", False) and self._limit < math.inf
        rows = self._tokenizer(pieces, **(self._cut if is_fast else self._options))
        lengths = [len(ids) for ids in rows["input_ids"]]
        if is_fast:
            for i, encoding in enumerate(rows.encodings):
                lengths[i] += sum(
                    rest.special_tokens_mask.count(0) for rest in encoding.overflowing
                )
        elif any(length > self._limit for length in lengths):
            rows = self._tokenizer(pieces, **self._cut)
        types = rows.get("token_type_ids") or [None] * len(pieces)
        return [
            (np.array(ids, np.int32), None if t is None else np.array(t, np.int32), length)
            for ids, t, length in zip(rows["input_ids"], types, lengths, strict=True)
        ]


# --- one warning for many calls ------------------------------------------------------------------


@dataclass
class TruncatedTexts:
    """The number of texts that were cut so far, and the limit in tokens."""

    num_long: int = 0
    limit: int | None = None

    def add(self, num_long: int, limit: int | None) -> None:
        """Count more texts that were cut."""
        self.num_long += num_long
        self.limit = limit or self.limit

    def warn(self, num_texts: int) -> None:
        """Log how many of ``num_texts`` texts were cut, if any."""
        if self.num_long:
            logger.warning(
                "%d of %d texts are longer than max_seq_length = %d tokens and were truncated.",
                self.num_long,
                num_texts,
                self.limit,
            )


_counting: ContextVar[TruncatedTexts | None] = ContextVar("moe_fast_truncated", default=None)


@contextmanager
def counted_truncation() -> Iterator[TruncatedTexts]:
    """Within the block and this thread, calls count the texts they cut, instead of warning."""
    count = TruncatedTexts()
    token = _counting.set(count)
    try:
        yield count
    finally:
        _counting.reset(token)


def _report(long: LongTexts) -> None:
    count = _counting.get()
    if count is not None:
        count.add(long.num_long, long.limit)
    else:
        TruncatedTexts(long.num_long, long.limit).warn(long.num_texts)
