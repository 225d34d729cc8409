"""Which columns of a source are read, and under which names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_fast.data import checks
from moe_fast.data.rows import Row

Value = Callable[[Any, str, str], Any]  # (value, column, place) -> the value, checked


@dataclass(frozen=True)
class Columns:
    """The columns of one layout of rows: how each is checked, and what the source calls it.

    Args:
        required: {our name: check}; must be in every row.
        optional: {our name: check}; read where the row has them.
        renamed: {our name: the source's name}; a column named here is required.
        keep: further columns of the source that are handed on unchanged; required as well.

    Raises:
        ValueError: a name in `renamed` or `keep` that cannot be meant.
    """

    required: Mapping[str, Value]
    optional: Mapping[str, Value] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        known = [*self.required, *self.optional]
        for name in self.renamed:
            if name not in known:
                raise ValueError(f"columns: unknown column {name!r}; known are {known}")
        _check_unique("columns", (self.renamed.get(name, name) for name in self.required))
        _check_unique("columns", self.renamed.values())
        if isinstance(self.keep, str):
            raise ValueError(f"keep must be a list of column names; got {self.keep!r}")
        _check_unique("keep", [*known, *self.keep])

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        """The columns of one row, checked, under our names.

        Raises:
            ValueError: a column is missing, or a value is not what its check allows.
        """
        sources = {name: self.renamed.get(name, name) for name in self.required}
        for name in self.optional:
            taken = name in self.renamed.values()  # it is another one of our columns
            if name in self.renamed or (name in row and not taken):
                sources[name] = self.renamed.get(name, name)
        checks.present(row, [*sources.values(), *self.keep], where)
        every = {**self.required, **self.optional}
        read = {name: every[name](row[source], source, where) for name, source in sources.items()}
        return {**read, **{name: checks.scalar(row[name], name, where) for name in self.keep}}


def _check_unique(argument: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{argument}: {name!r} is named twice")
        seen.add(name)
