"""Decides which columns of a source are read, and under which names.

A column is found by the name that the caller gives, else by our own name, else by one of its
`SPELLINGS`: the names that sentence-transformers and common datasets use, in upper or lower case,
with underscores, spaces or dashes. If two columns fit one of our names, that is an error. Columns
that are not read are named in one warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from moe_fast.data import checks
from moe_fast.data.file_formats import Row
from moe_fast.messages import SHOWN_NAMES, listed, nearest, shown, simplified

Value = Callable[[Any, str, str], Any]  # (value, column, place) -> the value, checked

_FIRST = ["anchor", "query", "question", "sentence1", "sentence_1", "sentence_a", "text1"]
_FIRST += ["text_1", "premise"]
_SECOND = ["positive", "document", "passage", "answer", "sentence2", "sentence_2", "sentence_b"]
_SECOND += ["text2", "text_2", "hypothesis"]
SPELLINGS: dict[str, tuple[str, ...]] = {
    "a": tuple(_FIRST),
    "b": tuple(_SECOND),
    "query": ("a", *(name for name in _FIRST if name != "query")),
    "pos": ("positives", "b", *_SECOND),
    "neg": ("negative", "negatives", "hard_negative", "hard_negatives"),
    "label": ("labels",),
    "domain": ("domains",),
    "score": ("scores", "similarity_score"),
    "id": ("_id",),
    "_id": ("id",),
}
"""{our name: other names for it}, as `moe_fast.messages.simplified` writes them."""

NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?(?:_?([0-9]{1,6}))?")  # matches a simplified name


def match_columns(
    present: Iterable[str],
    wanted: Iterable[str],
    given: Mapping[str, str] | None = None,
    where: str = "columns",
) -> dict[str, str]:
    """Find the wanted columns among those of a source.

    Args:
        present: the source's columns.
        wanted: our names.
        given: {our name: the source's name}, used without a check.
        where: the place, for the error message.

    Returns:
        {our name: the source's name} for the columns given and found. A wanted column that is not
        found is not in it.

    Raises:
        ValueError: two columns have spellings of one of our names, and neither has the name itself.
    """
    present = dict.fromkeys(present)
    found = dict(given or {})
    taken = set(found.values())
    for name in (wanted := [name for name in wanted if name not in found]):
        if name in present and name not in taken:
            found[name] = name
            taken.add(name)
    free: dict[str, list[str]] = {}
    for column in present:
        if column not in taken:
            free.setdefault(simplified(column), []).append(column)
    for name in wanted:
        if name not in found:
            spellings = (simplified(name), *SPELLINGS.get(name, ()))
            columns = [column for spelling in spellings for column in free.get(spelling, ())]
            _check_one(columns, name, where)
            if columns:
                found[name] = columns[0]
    return found


def match_negatives(
    present: Iterable[str], given: Mapping[str, str] | None = None, where: str = "columns"
) -> dict[str, str]:
    """Find the columns of hard negatives: ``negative``, ``negative_2``, ``neg_3``, ...

    Args:
        present, given, where: as for `match_columns`.

    Returns:
        {``negative_k``: the source's name}, sorted by k. A name without a number counts as
        ``negative_1``.

    Raises:
        ValueError: two columns have the same number k, and neither is called ``negative_k``.
    """
    given = {name: column for name, column in (given or {}).items() if numbered(name)}
    columns: dict[int, list[str]] = {}
    for column in present:
        if column not in given.values() and (number := numbered(column)) is not None:
            columns.setdefault(number, []).append(column)
    found = dict(given)
    for number, spelt in columns.items():
        name = f"negative_{number}"
        if name not in found:
            spelt = [name] if name in spelt else spelt
            _check_one(spelt, name, where)
            found[name] = spelt[0]
    return dict(sorted(found.items(), key=lambda item: numbered(item[0]) or 0))


def numbered(column: str) -> int | None:
    """Return the number of a column of hard negatives (1 without one), None for other columns."""
    match = NEGATIVE.fullmatch(simplified(column)) if len(column) < 100 else None
    return None if match is None else int(match.group(1) or 1)


def our_name(column: str) -> str | None:
    """Return our name for a column: ``a``, ``b``, ``negative_k``, ``label`` or ``domain``.

    Returns None if the name is a spelling of none of these.
    """
    if (number := numbered(column)) is not None:
        return f"negative_{number}"
    names = ("a", "b", "label", "domain")
    plain = simplified(column)
    return next((name for name in names if plain in (name, *SPELLINGS[name])), None)


def ignored_note(ignored: Collection[str], known: Iterable[str]) -> str:
    """Write a warning about columns that are not read; it names those close to a known name."""
    known = list(known)
    spellings = [*known, *(other for name in known for other in SPELLINGS.get(name, ()))]
    near = []
    for column in list(ignored)[:SHOWN_NAMES]:
        if meant := our_name(column) or nearest(column, spellings):
            near.append(f"{shown(column)} is close to {meant!r}")
    hint = f" ({'; '.join(near)})" if near else ""
    return (
        f"columns that are not read: {listed(ignored)}{hint}; another name for a column that is "
        'read is given by columns={"our name": "its name"}, --columns OURS=ITS'
    )


@dataclass(frozen=True)
class Columns:
    """The columns of one layout of rows: how each is checked, and what the source calls it.

    Args:
        required: {our name: check} of the columns that must be in every row.
        optional: {our name: check} of the columns that are read if the row has them and they are
            not null.
        renamed: {our name: the source's name}; every row must have a column named here.
        keep: further columns of the source that are passed on unchanged; every row must have them.
        spelt: {our name: the source's name} as found by their spelling; see `matched`.

    Raises:
        ValueError: `renamed` has a key that is none of our names.
        ValueError: two of our names are given the same column, or `keep` names a column twice or
            has one of our names.
        ValueError: `keep` is a string.
    """

    required: Mapping[str, Value]
    optional: Mapping[str, Value] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    keep: Sequence[str] = ()
    spelt: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.renamed:
            if name not in self.known:
                raise ValueError(f"columns: unknown column {name!r}; known are {self.known}")
        _check_unique("columns", (self.renamed.get(name, name) for name in self.required))
        _check_unique("columns", self.renamed.values())
        if isinstance(self.keep, str):
            raise ValueError(f"keep must be a list of column names; got {self.keep!r}")
        _check_unique("keep", [*self.known, *self.keep])

    @property
    def known(self) -> list[str]:
        """Our names of the required and the optional columns."""
        return [*self.required, *self.optional]

    def matched(self, present: Iterable[str], where: str) -> Self:
        """Return a copy in which the columns `present` are found by their spellings.

        Raises:
            ValueError: two columns have spellings of one of our names; see `match_columns`.
        """
        return replace(self, spelt=match_columns(present, self.known, self.renamed, where))

    @cached_property
    def sources(self) -> dict[str, str]:
        """{our name: the source's name} of all columns to read.

        An optional column is left out if `renamed` gives its column of the source to another name.
        """
        given = set(self.renamed.values())
        names = {name: self.renamed.get(name, self.spelt.get(name, name)) for name in self.known}
        return {
            name: source
            for name, source in names.items()
            if name in self.required or name in self.renamed or source not in given
        }

    @cached_property
    def reads(self) -> frozenset[str]:
        """The source's names of all columns to read, including those in `keep`."""
        return frozenset([*self.sources.values(), *self.keep])

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        """Check the columns of a row, and return them under our names.

        Raises:
            ValueError: a column is missing, or a value fails its check.
        """
        must = [self.sources[name] for name in (*self.required, *self.renamed)]
        checks.present(row, [*must, *self.keep], where)
        read = {}
        for name, source in self.sources.items():
            if name in self.required:
                read[name] = self.required[name](row[source], name, where)
            elif row.get(source) is not None:
                read[name] = self.optional[name](row[source], name, where)
        return {**read, **{name: checks.scalar(row[name], name, where) for name in self.keep}}


def _check_one(columns: Sequence[str], name: str, where: str) -> None:
    if len(columns) > 1:
        raise ValueError(
            f"{where}: the columns {listed(columns)} may each be meant by {name!r}; say which, "
            f'with columns={{"{name}": ...}} or --columns {name}=...'
        )


def _check_unique(argument: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{argument}: {name!r} is named twice")
        seen.add(name)
