"""Reads judgements: which documents answer a query, and how well (qrels).

Two kinds of files are read. BEIR's have three cells between tabs, query id, document id and
relevance, and may begin with a header. TREC's, as pyserini, trec_eval, MIRACL and MLDR have them,
have four columns between spaces or tabs: query id, a column that nothing uses (Q0 or 0), document
id and relevance.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from moe_fast.data.lines import read_lines
from moe_fast.messages import shown

MAX_RELEVANCE = 1_000_000  # trec_eval's memory and time grow with the largest relevance

Qrels = dict[str, dict[str, int]]


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read the judgements in a file, compressed (``.gz``) or not.

    Args:
        path: a file of three or of four columns; the first line says which, for all lines.

    Returns:
        {query id: {document id: relevance}}, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another number of columns, its relevance is no whole number or beyond
            a million, or a document is judged twice for a query; the error names the line.
        ValueError: the file has no judgements.
    """
    path = Path(path)
    qrels: Qrels = {}
    lines: dict[tuple[str, str], int] = {}
    four: bool | None = None
    for line, text in read_lines(path):
        where = f"{path}, line {line}"
        if not text.strip("\r\n ") or (line == 1 and _is_header(text)):
            continue
        if four is None:
            four = len(text.split("\t")) != 3 and len(text.split()) == 4
        query, document, relevance = _cells(text, four, where)
        whole = re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", relevance)  # int() would also accept 1_0
        value = check_relevance(int(relevance) if whole else relevance, where)
        if (query, document) in lines:
            raise ValueError(
                f"{where}: query {shown(query)} and document {shown(document)} were judged before, "
                f"in line {lines[query, document]}"
            )
        lines[query, document] = line
        qrels.setdefault(query, {})[document] = value
    if not qrels:
        raise ValueError(f"{path}: no judgements")
    return qrels


def _is_header(text: str) -> bool:
    return text.rstrip("\r\n").split("\t")[-1].strip() == "score"


def _cells(text: str, four: bool, where: str) -> tuple[str, str, str]:
    """Return query, document and relevance of a line."""
    if four:
        words = text.split()
        if len(words) != 4:
            raise ValueError(
                f"{where}: {len(words)} columns; expected query id, Q0, document id, relevance"
            )
        return words[0], words[2], words[3]
    cells = text.rstrip("\r\n").split("\t")
    if len(cells) != 3:
        raise ValueError(
            f"{where}: {len(cells)} cells between tabs; expected query id, document id, "
            "relevance, or TREC's four columns (query id, Q0, document id, relevance)"
        )
    return cells[0], cells[1], cells[2]


def check_relevance(value: Any, where: str) -> int:
    """Return a relevance, which must be a whole number of a sensible size."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_RELEVANCE:
        raise ValueError(
            f"{where}: relevance must be a whole number from {-MAX_RELEVANCE:,} to "
            f"{MAX_RELEVANCE:,}, got {shown(value)}"
        )
    return value
