"""Makes ``docs/benchmarks.md`` and its pictures from the results: ``python -m bench.report``."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
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
    "gather_rows": "rows",
    "combine_rows": "rows",
    "expert MLP beside dense": "expert_mlp",
    "privacy-filter experts": "privacy_filter",
    "MoE layer": "moe_mlp",
    "contrastive loss": "info_nce",
    "MaxSim": "maxsim",
    "import": "import_time",
}
"""The operation files that are not called as their operations are."""
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
    for name, record in records.items():
        text += "\n" + section(name, record, images)
    with atomic_write(arguments.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{arguments.output}: {len(records)} runs")
    return 0


def section(name: str, record: Record, images: Path) -> str:
    """Return the part of the page about one run; draws its pictures into ``images``."""
    parts = [f"## {name}\n", machine_lines(record)]
    single = [row for row in record.rows if row.sweep is None and row.peak_bytes is None]

    def picture(kind: str, sentence: str, draw: Callable[..., None], *what: Any) -> str:
        draw(*what, images / f"bench-{name}-{kind}.png")
        return f"![{sentence}](images/bench-{name}-{kind}.png)\n\n{sentence}\n"

    best = best_of_others(single)
    if best:
        sentence = (
            "The fastest alternative that computes the same, per operation: the mean over all "
            "shapes, the line from least to most."
        )
        parts.append(picture("best", sentence, pictures.draw_best, best))
    for number, (title, rows) in enumerate(groups(single).items()):
        operation = rows[0].operation.partition(",")[0]
        file = FILES.get(operation, operation.lower().replace(" ", "_"))
        parts.append(f"### {title}\n\nRepeat: `python -m bench {file}`\n")
        if any(row.ratio and row.who != row.baseline for row in rows):
            sentence = f"How long each candidate takes, {rows[0].baseline} being 1: {title}."
            parts.append(picture(str(number), sentence, pictures.draw_ratios, rows, title))
        parts.append(table(rows))
    return "\n".join([*parts, *growth_parts(record, picture)])


def growth_parts(record: Record, picture: Callable[..., str]) -> list[str]:
    """Return roofline, growth and memory, if they were measured."""
    parts = []
    if record.machine and any(r.who == OURS and r.work and r.work.flop for r in record.rows):
        sentence = "How near moe_fast comes to what this machine could do at best."
        drawn = picture("roofline", sentence, pictures.draw_roofline, record.rows, record.machine)
        parts += ["### The limit\n", drawn]
    curves = curves_of(record.rows, lambda row: row.seconds.median * 1e3 if row.seconds else None)
    if curves:
        sentence = "How time grows with one size, the others fixed; in the legend the exponent."
        parts += [
            "### Growth\n\nRepeat: `python -m bench growth`\n",
            picture("growth", sentence, pictures.draw_curves, curves, "ms"),
            growth_table(curves),
        ]
    curves = curves_of(record.rows, lambda row: row.peak_bytes and row.peak_bytes / 2**20)
    if curves:
        sentence = "What one forward and backward takes beyond its inputs, in fresh processes."
        parts += [
            "### Memory\n\nRepeat: `python -m bench peak_memory`\n",
            picture("memory", sentence, pictures.draw_curves, curves, "MiB beyond the inputs"),
            memory_table(curves),
        ]
    return parts


def machine_lines(record: Record) -> str:
    """Describe machine, versions and noise of a run."""
    e = record.environment
    versions = ", ".join(f"{name} {v}" for name, v in e.get("versions", {}).items() if v)
    lines = [
        f"{e.get('cpu')}, {e.get('threads')} threads of {e.get('cpus')} processors; {versions}; "
        f"Python {e.get('python')}; commit {str(e.get('commit'))[:12]}; {e.get('time')}.\n"
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


def table(rows: Sequence[Row]) -> str:
    """Return a table with a line per candidate and shape, and why some did not run."""
    lines = [("shape", "candidate", f"time over {rows[0].baseline}'s", "ms", "share of the floor")]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        shape = " ".join(f"{k}={v}" for k, v in row.shape.items())
        if row.ratio and row.seconds:
            share = f"{row.share_of_floor:.0%}" if row.share_of_floor else ""
            milliseconds = f"{row.seconds.median * 1e3:.3g}"
            lines.append((shape, row.who, row.ratio.shown(2), milliseconds, share))
        elif row.reason:
            reasons.setdefault(f"{row.who}: {row.reason}", []).append(shape)
    count = len({row.case for row in rows})
    notes = [
        f"- {reason}" + ("" if len(shapes) == count else f" ({'; '.join(shapes)})")
        for reason, shapes in reasons.items()
    ]
    return markdown(lines) + "\n".join(["", "Not run:", "", *notes, ""] if notes else [])


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
