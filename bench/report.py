"""Makes ``docs/benchmarks.md`` and its pictures from the results: ``python -m bench.report``."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_fast.files import atomic_write

from . import pictures
from .cases import OURS
from .growth import Curve, curves_of
from .harness import ROOT
from .info_nce import PRODUCTS
from .maxsim import PRODUCTS as MAXSIM_PRODUCTS
from .record import Record, Row, read_record

INTRODUCTION = Path(__file__).with_name("introduction.md")
FILES = {
    "gather_rows": "bench rows",
    "combine_rows": "bench rows",
    "expert MLP beside dense": "bench expert_mlp",
    "privacy-filter experts": "bench privacy_filter",
    "MoE layer": "bench moe_mlp",
    "contrastive loss": "bench info_nce",
    "MaxSim": "bench maxsim",
    "import": "bench import_time",
    "natural step beside dense": "bench natural_step",
    "embedding beside other runtimes": "bench.embedding_peers {dtype}",
}
"""What measures an operation, where it is not called as the operation is."""
PROCESSOR = "cpu-"
"""Begins the names of records that hold the same operations on different processors."""
NO_ALTERNATIVES = (OURS, "dense", "dense, compiled", PRODUCTS, MAXSIM_PRODUCTS, "bare products")
"""The candidates that are moe_fast itself, or compute something else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args(argv)
    files = sorted(arguments.results.glob("*.json"))
    if not files:
        parser.error(f"--results must be a folder of .json files; {arguments.results} has none")
    text = INTRODUCTION.read_text(encoding="utf-8")
    images = arguments.output.parent / "images"
    try:
        every = {file.stem: read_record(file) for file in files}
    except ValueError as error:
        parser.error(str(error))
    records = {name: record for name, record in every.items() if record.rows}
    processors = {n: record for n, record in records.items() if n.startswith(PROCESSOR)}
    for name, record in records.items():
        if name not in processors:
            text += "\n" + section({name: record}, name, images)
        elif name == next(iter(processors)):  # all of them stand where the first would
            title = name if len(processors) == 1 else "Several processors"
            text += "\n" + section(processors, title, images)
    with atomic_write(arguments.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{arguments.output}: {len(records)} runs")
    return 0


def section(records: Mapping[str, Record], title: str, images: Path) -> str:
    """Return the part of the page about one run, or about the same operations on processors.

    Its pictures are drawn into ``images``, for each record its own.
    """
    several = len(records) > 1
    parts = [f"## {title}\n"]
    singles: dict[str, list[Row]] = {}
    labels = labels_of(records)
    for name, record in records.items():
        parts.append((f"**{labels[name]}**: " if several else "") + machine_lines(record))
        singles[name] = [r for r in record.rows if r.sweep is None and r.peak_bytes is None]
        best = best_of_others(singles[name])
        if best:
            sentence = (
                "The fastest alternative that computes the same, per operation: the mean over all "
                "shapes, the line from least to most."
            )
            parts.append(picture(images, name, "best", sentence, pictures.draw_best, best))
    titles = dict.fromkeys(t for rows in singles.values() for t in groups(rows))
    grouped = {name: groups(rows) for name, rows in singles.items()}
    for group in titles:
        found = {name: rows[group] for name, rows in grouped.items() if group in rows}
        first = next(iter(found.values()))[0]
        operation = first.operation.partition(",")[0]
        file = FILES.get(operation, "bench " + operation.lower().replace(" ", "_"))
        command = file.format(dtype=first.dtype)
        parts.append(f"### {group}\n\nRepeat: `python -m {command}`\n")
        for name, rows in found.items():
            if any(row.ratio and row.who != row.baseline for row in rows):
                sentence = f"How long each candidate takes, {rows[0].baseline} being 1: {group}"
                sentence += f", {labels[name]}." if several else "."
                number = list(grouped[name]).index(group)
                draw = pictures.draw_ratios
                parts.append(picture(images, name, str(number), sentence, draw, rows, group))
        if several and len(found) == 1:
            parts.append(f"On {labels[next(iter(found))]}:\n")
        parts.append(table({labels[name]: rows for name, rows in found.items()}))
    for name, record in records.items():
        heading = f" on {labels[name]}" if several else ""
        parts += growth_parts(record, heading, partial(picture, images, name))
    return "\n".join(parts)


def labels_of(records: Mapping[str, Record]) -> dict[str, str]:
    """Return a name for each record's processor; that of the file where two are the same."""
    cpus = {name: str(record.environment.get("cpu")) for name, record in records.items()}
    return {
        name: cpu if list(cpus.values()).count(cpu) == 1 else name for name, cpu in cpus.items()
    }


def picture(
    images: Path, name: str, kind: str, sentence: str, draw: Callable[..., None], *what: Any
) -> str:
    """Draw a picture of a record, and return the lines that show it."""
    draw(*what, images / f"bench-{name}-{kind}.png")
    return f"![{sentence}](images/bench-{name}-{kind}.png)\n\n{sentence}\n"


def growth_parts(record: Record, heading: str, picture: Callable[..., str]) -> list[str]:
    """Return roofline, growth and memory, if they were measured; ``heading`` says where."""
    parts = []
    if record.machine and any(r.who == OURS and r.work and r.work.flop for r in record.rows):
        sentence = "How near moe_fast comes to what this machine could do at best."
        drawn = picture("roofline", sentence, pictures.draw_roofline, record.rows, record.machine)
        parts += [f"### The limit{heading}\n", drawn]
    curves = curves_of(record.rows, lambda row: row.seconds.median * 1e3 if row.seconds else None)
    if curves:
        sentence = "How time grows with one size, the others fixed; in the legend the exponent."
        parts += [
            f"### Growth{heading}\n\nRepeat: `python -m bench growth`\n",
            picture("growth", sentence, pictures.draw_curves, curves, "ms"),
            growth_table(curves),
        ]
    curves = curves_of(record.rows, lambda row: row.peak_bytes and row.peak_bytes / 2**20)
    if curves:
        sentence = "What one forward and backward takes beyond its inputs, in fresh processes."
        parts += [
            f"### Memory{heading}\n\nRepeat: `python -m bench peak_memory`\n",
            picture("memory", sentence, pictures.draw_curves, curves, "MiB beyond the inputs"),
            memory_table(curves),
        ]
    return parts


def machine_lines(record: Record) -> str:
    """Describe machine, versions and noise of a run."""
    e = record.environment
    commits = f"commit {str(e.get('commit'))[:12]}"
    if e.get("earlier_commits"):
        commits += f", parts at {', '.join(c[:12] for c in e['earlier_commits'])}"
    versions = ", ".join(f"{name} {v}" for name, v in e.get("versions", {}).items() if v)
    lines = [
        f"{e.get('cpu')}, {e.get('threads')} threads of {e.get('cpus')} processors; {versions}; "
        f"Python {e.get('python')}; {commits}; {e.get('time')}.\n"
    ]
    if record.machine:
        lines.append(f"The machine's limits: {record.machine}.\n")
    if record.noisy:
        lines.append(f"**A noisy run**: {'; '.join(record.noisy)}. Its figures deserve doubt.\n")
    return "\n".join(lines)


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by operation and dtype."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.operation}, {row.dtype}".removesuffix(", "), []).append(row)
    return found


def best_of_others(rows: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    """Return the ratios of the fastest alternative, by operation and dtype.

    They are the geometric mean, least and most over shapes. :data:`NO_ALTERNATIVES` are left out.
    """
    best: dict[str, tuple[float, float, float]] = {}
    for title, members in groups(rows).items():
        cases: dict[tuple[str, str, str], float] = {}
        for row in members:
            if row.ratio and row.baseline == OURS and row.who not in NO_ALTERNATIVES:
                cases[row.case] = min(cases.get(row.case, math.inf), row.ratio.median)
        if cases:
            ratios = list(cases.values())
            best[title] = (statistics.geometric_mean(ratios), min(ratios), max(ratios))
    return best


def table(columns: Mapping[str, Sequence[Row]]) -> str:
    """Return a table with a line per candidate and shape, and why some did not run.

    Args:
        columns: the rows of each processor, by its name; several stand side by side.
    """
    named = len(columns) > 1
    cells = {label: {_line(row): _cells(row) for row in rows} for label, rows in columns.items()}
    heads = [
        (label, head)
        for label, found in cells.items()
        for head in dict.fromkeys(h for values in found.values() for h in values)
    ]
    header = (
        "shape",
        "candidate",
        *(f"{head}, {label}" if named else head for label, head in heads),
    )
    lines = [header]
    for line in dict.fromkeys(line for found in cells.values() for line in found):
        values = [cells[label].get(line, {}).get(head, "") for label, head in heads]
        if any(values):
            lines.append((*line, *values))
    notes = [
        f"- {label + ': ' if named else ''}{reason}"
        for label, rows in columns.items()
        for reason in _reasons(rows)
    ]
    return markdown(lines) + "\n".join(["", "Not run:", "", *notes, ""] if notes else [])


def _line(row: Row) -> tuple[str, str]:
    return " ".join(f"{k}={v}" for k, v in row.shape.items()), row.who


def _cells(row: Row) -> dict[str, str]:
    """What one processor's columns say about a row, by the columns' heads."""
    if not row.ratio or not row.seconds:
        return {}
    cells = {f"time over {row.baseline}'s": row.ratio.shown(2)}
    cells["ms"] = f"{row.seconds.median * 1e3:.3g}"
    if row.share_of_floor:
        cells["share of the floor"] = f"{row.share_of_floor:.0%}"
    for name, value in (row.figures or {}).items():
        cells[name] = f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
    return cells


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why candidates did not run, and in which shapes unless it was in all."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault(f"{row.who}: {row.reason}", []).append(_line(row)[0])
    count = len({row.case for row in rows})
    return [
        reason + ("" if len(shapes) == count else f" ({'; '.join(shapes)})")
        for reason, shapes in reasons.items()
    ]


def growth_table(curves: Sequence[Curve]) -> str:
    """Return a table of the fitted exponents."""
    lines = [("operation", "size", "from, to", "candidate", "exponent")]
    for c in curves:
        error = "" if math.isnan(c.error) else f" ± {c.error:.2f}"
        span = f"{c.sizes[0]:,} .. {c.sizes[-1]:,}"
        lines.append((c.operation, c.letter, span, c.who, f"{c.exponent:.2f}{error}"))
    return markdown(lines)


def memory_table(curves: Sequence[Curve]) -> str:
    """Return a table of the peaks in MiB."""
    lines = [("operation", "size", "candidate", "MiB")]
    for c in curves:
        for size, value in zip(c.sizes, c.values, strict=True):
            lines.append((c.operation, f"{c.letter}={size:,}", c.who, f"{value:.0f}"))
    return markdown(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format a table; its first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])


if __name__ == "__main__":
    sys.exit(main())
