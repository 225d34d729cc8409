"""Reads and writes TREC run files: ``query Q0 document rank score tag``, one hit per line."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from moe_fast.data.file_formats import read_lines
from moe_fast.data.write import open_text
from moe_fast.files import atomic_write

Run = dict[str, dict[str, float]]  # {query: {document: score}}, best first


def write_run(
    run: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str], *, tag: str = "moe_fast"
) -> None:
    """Write a run file.

    Args:
        run: {query: {document: score}}, best first.
        path: the file to write, compressed if its name ends in ``.gz``. After an error there is no
            file, or still the old one.
        tag: the run's name, which is the last column.

    Raises:
        ValueError: an id or the tag is empty or has white space, which the format cannot quote.
        ValueError: a score is not finite, or is higher than the one before it.
    """
    _check_word(tag, "tag")
    with atomic_write(path) as temporary, open_text(temporary) as file:
        for query, scores in run.items():
            _check_word(query, "query id")
            last = math.inf
            for rank, (document, score) in enumerate(scores.items(), start=1):
                _check_word(document, "document id")
                if not math.isfinite(score) or score > last:
                    raise ValueError(
                        f"run: query {query!r}, document {document!r}: scores must be finite and "
                        f"must not rise; got {score!r} after {last!r}"
                    )
                last = score
                file.write(f"{query} Q0 {document} {rank} {float(score)!r} {tag}\n")


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run file, compressed (``.gz``) or not, and sort each query's hits by score.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line does not have six columns, its score is no finite number, or a query has
            the same document twice; the error names the file and the line.
        ValueError: the file has no hits.
    """
    run: Run = {}
    for line, text in read_lines(Path(path)):
        if not text.strip():
            continue
        query, document, score = _parse(text.split(), f"{path}, line {line}")
        if document in run.setdefault(query, {}):
            raise ValueError(
                f"{path}, line {line}: document {document!r} is there twice for query {query!r}"
            )
        run[query][document] = score
    if not run:
        raise ValueError(f"{path}: no hits in this file")
    return {q: dict(sorted(hits.items(), key=lambda hit: -hit[1])) for q, hits in run.items()}


def _parse(columns: list[str], where: str) -> tuple[str, str, float]:
    if len(columns) != 6:
        raise ValueError(
            f"{where}: expected 6 columns (query Q0 document rank score tag), got {len(columns)}"
        )
    query, _, document, _, text, _ = columns
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: the score must be a finite number, got {text!r}")
    return query, document, score


def _check_word(word: str, name: str) -> None:
    if len(word.split()) != 1 or word != word.strip():
        raise ValueError(f"{name} {word!r} must not be empty or have white space in a run file")
