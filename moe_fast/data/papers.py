"""Reads a file of papers that cite each other into a citation graph."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.data import checks
from moe_fast.data.columns import Columns, Value
from moe_fast.data.file_formats import Row
from moe_fast.data.sources import AnySource, FileSource, first_row, open_source
from moe_fast.data.tables import placed_rows
from moe_fast.messages import reason, shown

if TYPE_CHECKING:
    from scipy.sparse import csr_array

REQUIRED: dict[str, Value] = {"id": checks.identifier, "abstract": checks.text}
OPTIONAL: dict[str, Value] = {
    "citing": checks.identifiers,
    "cited_by": checks.identifiers,
    "domain": checks.text,
}


@dataclass(frozen=True)
class Papers:
    """The N papers of a file, in the file's order, and the citations between them.

    Papers with the same abstract are merged into one, with the citations of all and the id and
    domain of the first. Otherwise the same text could be in two splits.

    Attributes:
        ids, abstracts: the id and abstract of each of the N papers.
        domains: the domain of each paper, or None if the file has none.
        citations: sparse [N, N] int32, 1 where the row's paper cites the column's.
        rows: the number of rows of the file.
        links_outside: citations with one end that is not in the file; `citations` lacks them.
        self_citations: citations of a paper by itself; `citations` lacks them.
    """

    ids: list[str]
    abstracts: list[str]
    domains: list[str] | None
    citations: csr_array
    rows: int
    links_outside: int
    self_citations: int

    def __len__(self) -> int:
        return len(self.ids)


def read_papers(
    source: AnySource,
    *,
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
    skip_invalid: bool = False,
) -> Papers:
    """Read papers ``{"id", "abstract", "citing": [id, ...], "cited_by": [id, ...], "domain"}``.

    A citation may be listed by the citing paper, by the cited paper or by both; it counts once.

    Args:
        source: a file or a dataset as in `read_pairs`. In the cells of a CSV file ids are separated
            by white space, or are a JSON list. A row needs ``citing`` (the papers that this one
            cites) or ``cited_by``, or has both; ``domain`` is in every row or in none. Ids are
            strings or whole numbers; 7 and "7" are the same id.
        columns: {our name: the source's name} where they differ.
        delimiter: see `read_pairs`.
        skip_invalid: see `read_pairs`. An id given twice, a row without citations and a domain in
            some rows only are errors nevertheless.

    Raises:
        FileNotFoundError, TypeError: as `read_pairs`.
        ValueError: an id is given twice; the error names both lines.
        ValueError: an id is neither a string nor a whole number.
        ValueError: a row has neither ``citing`` nor ``cited_by``.
        ValueError: as `read_pairs` otherwise.
        ImportError: scipy or datasets is not installed.
    """
    opened = open_source(source, delimiter=delimiter)
    where, row = first_row(opened, skip_invalid)
    has_cells = isinstance(opened, FileSource) and opened.delimiter is not None
    links = dict.fromkeys(("citing", "cited_by"), _ids_in_cell) if has_cells else {}
    wanted = Columns(REQUIRED, {**OPTIONAL, **links}, columns or {}).matched(row, where)
    reading = _Reading()
    for where, row in placed_rows(opened, wanted, skip_invalid):
        reading.add(row, where)
    return reading.finish()


def _ids_in_cell(value: str, name: str, where: str) -> list[str]:
    """Read the ids in a cell of a CSV file, which may be empty.

    Raises:
        ValueError: the cell begins with "[" but is no JSON list of ids.
    """
    if not value.startswith("["):
        return value.split()
    try:
        ids = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {name} is no JSON list of ids ({reason(error)})") from error
    return checks.identifiers(ids, name, where)


@dataclass
class _Reading:
    """The papers read so far. Every id, also one only cited, gets an integer key."""

    keys: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    papers: dict[str, int] = field(default_factory=dict)  # abstract -> number
    ids: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    paper_keys: array[int] = field(default_factory=lambda: array("q"))
    paper_numbers: array[int] = field(default_factory=lambda: array("q"))
    citing: array[int] = field(default_factory=lambda: array("q"))
    cited: array[int] = field(default_factory=lambda: array("q"))

    def add(self, row: Row, where: str) -> None:
        if row["id"] in self.places:
            raise ValueError(
                f"{where}: id {shown(row['id'])} was given before, {self.places[row['id']]}"
            )
        if "citing" not in row and "cited_by" not in row:
            raise ValueError(f"{where}: columns 'citing' and 'cited_by' are both missing")
        if self.places and ("domain" in row) != bool(self.domains):
            raise ValueError(f"{where}: domain must be in every row or in none")
        self.places[row["id"]] = where
        number = self.papers.setdefault(row["abstract"], len(self.papers))
        if number == len(self.ids):
            self.ids.append(row["id"])
            self.domains.extend([row["domain"]] if "domain" in row else [])
        key = self._key(row["id"])
        self.paper_keys.append(key)
        self.paper_numbers.append(number)
        for other in row.get("citing", ()):
            self._link(key, self._key(other))
        for other in row.get("cited_by", ()):
            self._link(self._key(other), key)

    def finish(self) -> Papers:
        from scipy.sparse import csr_array

        number_of_key = np.full(len(self.keys), -1, dtype=np.int64)
        number_of_key[self.paper_keys] = self.paper_numbers
        links = _unique_pairs(np.asarray(self.citing), np.asarray(self.cited), len(self.keys))
        citing, cited = number_of_key[links[0]], number_of_key[links[1]]
        outside = (citing < 0) | (cited < 0)
        itself = ~outside & (citing == cited)
        kept = ~outside & ~itself
        n = len(self.ids)
        citing, cited = _unique_pairs(citing[kept], cited[kept], n)
        ones = np.ones(len(citing), dtype=np.int32)
        return Papers(
            ids=self.ids,
            abstracts=list(self.papers),
            domains=self.domains or None,
            citations=csr_array((ones, (citing, cited)), shape=(n, n)),
            rows=len(self.places),
            links_outside=int(outside.sum()),
            self_citations=int(itself.sum()),
        )

    def _key(self, name: str) -> int:
        return self.keys.setdefault(name, len(self.keys))

    def _link(self, citing: int, cited: int) -> None:
        self.citing.append(citing)
        self.cited.append(cited)


def _unique_pairs(
    first: NDArray[np.int64], second: NDArray[np.int64], size: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sort pairs of numbers below `size`, and remove duplicates."""
    keys = np.unique(first.astype(np.int64) * size + second)
    return keys // size, keys % size
