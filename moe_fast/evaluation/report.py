"""Formats evaluations and comparisons as one table, for a terminal or for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_fast.evaluation.result import Comparison, Evaluation, Score

_SIZES = ("pairs", "queries")


def format_table(
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison] = (),
    *,
    markdown: bool = False,
) -> str:
    """Format a table with a row for each model and domain, followed by rows for the differences.

    Args:
        evaluations: evaluations of one task, with the same metrics.
        comparisons: differences of such evaluations, shown with a sign.
        markdown: format it as a Markdown table; otherwise as columns of plain text.

    Returns:
        The table, without a newline at its end. A cell is a value with its interval, such as
        ``.614 [.588, .640]``, or ``-`` if the value is undefined.

    Raises:
        ValueError: there are no evaluations, or the tasks or metrics differ.
    """
    if not evaluations:
        raise ValueError("evaluations is empty; there is nothing to show")
    metrics = _metrics(evaluations[0].scores)
    shown = [(one.task, _metrics(one.scores)) for one in evaluations]
    shown += [(one.task, _metrics(one.differences)) for one in comparisons]
    for other in shown:
        if other != shown[0]:
            raise ValueError(
                f"one table shows one task and the same metrics; got {shown[0]} and {other}"
            )
    size = next(name for name in _SIZES if name in next(iter(evaluations[0].details.values())))
    rows = [["system", "domain", size, *_headers(evaluations[0], metrics)]]
    for evaluation in evaluations:
        for group, scores in evaluation.scores.items():
            cells = [_cell(scores[name]) for name in metrics]
            rows.append([evaluation.model, group, str(evaluation.details[group][size]), *cells])
    for comparison in comparisons:
        for group, scores in comparison.differences.items():
            cells = [_cell(scores[name], signed=True) for name in metrics]
            rows.append([f"{comparison.first} - {comparison.second}", group, "", *cells])
    return _markdown(rows) if markdown else _plain(rows)


def _metrics(scores: dict[str, dict[str, Score]]) -> list[str]:
    return list(next(iter(scores.values())))


def _headers(evaluation: Evaluation, metrics: list[str]) -> list[str]:
    bootstrap = evaluation.settings["bootstrap"]
    interval = f" [{100 * bootstrap['confidence']:g} %]" if bootstrap["resamples"] else ""
    return [f"{name}{interval}" for name in metrics]


def _cell(score: Score, *, signed: bool = False) -> str:
    if not math.isfinite(score.value):
        return "-"
    if not math.isfinite(score.low):
        return format_number(score.value, signed=signed)
    value, low, high = (
        format_number(x, signed=signed) for x in (score.value, score.low, score.high)
    )
    return f"{value} [{low}, {high}]"


def format_number(value: float, *, signed: bool = False) -> str:
    """Format with three decimals and no zero before the point: ``.614``, ``-.050``, ``1.000``."""
    text = f"{value:{'+' if signed else ''}.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else text


def _plain(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in cells
    )
