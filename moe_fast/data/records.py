"""Reads the texts of documents or queries, each with an id, from files of several publishers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fast.data import checks
from moe_fast.data.file_formats import Row, read_rows
from moe_fast.data.lines import read_lines
from moe_fast.messages import shown

Texts = dict[str, str]
Drops = Counter[str] | None  # {kind: number left out} with on_missing="drop"; None for "error"

# BEIR's names come first. Then MIRACL's and MLDR's documents, MLDR's queries, pyserini's documents.
ID_NAMES = ("_id", "id", "docid", "query_id", "qid")
TEXT_NAMES = ("text", "query", "contents")


def read_records(paths: Sequence[Path], kind: str, drops: Drops) -> tuple[Texts, Texts | None]:
    """Read the texts of one or several files.

    Args:
        paths: ``.jsonl`` files, also ``.gz``, with an id, a text, and perhaps ``title`` and
            ``domain``; or ``.tsv`` files of two cells, id and text, without a header. What the
            columns may be called is in `ID_NAMES` and `TEXT_NAMES`; the first name that a row has
            counts.
        kind: what is counted in `drops`, such as "documents".
        drops: if given, an empty text is left out and counted, otherwise it is an error.

    Returns:
        ({id: text}, {id: domain}, or None without domains). A title stands before its text, with a
        space between.

    Raises:
        ValueError: an id is given twice; the error names both places.
        ValueError: a text is empty, only some rows have a domain, or there are no rows.
    """
    texts: Texts = {}
    domains: Texts = {}
    places: dict[str, str] = {}
    for where, row in _rows(paths):
        name, text_name = _name(row, ID_NAMES, where), _name(row, TEXT_NAMES, where)
        key = checks.identifier(row[name], name, where)
        if key in places:
            raise ValueError(f"{where}: {name} {shown(key)} was given before, {places[key]}")
        places[key] = where
        if drops is not None and not (row[text_name] or row.get("title")):
            drops[kind] += 1
            continue
        texts[key] = _text(row, text_name, where)
        if row.get("domain") is not None:
            domains[key] = checks.text(row["domain"], "domain", where)
        if len(domains) not in (0, len(texts)):
            raise ValueError(f"{where}: domain must be in every row of the file or in none")
    if not texts:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows")
    return texts, domains or None


def _rows(paths: Iterable[Path]) -> Iterator[tuple[str, Row]]:
    for path in paths:
        if not path.name.lower().endswith((".tsv", ".tsv.gz")):
            yield from read_rows(path)
            continue
        for line, text in read_lines(path):
            if not text.strip():
                continue
            where, cells = f"{path}, line {line}", text.rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise ValueError(f"{where}: {len(cells)} cells between tabs; expected id and text")
            yield where, {"id": cells[0], "text": cells[1]}


def _name(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """Return the first of the names that the row has."""
    found = next((name for name in names if name in row), None)
    if found is None:
        checks.present(row, names[:1], where)
    assert found is not None
    return found


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    title = row.get("title") or ""
    if not title:
        return checks.text(row[name], name, where)
    title = checks.text(title, "title", where)
    if row[name] == "":  # some documents of BEIR's sets consist of a title only
        return title
    return f"{title} {checks.text(row[name], name, where)}"
