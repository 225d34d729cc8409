"""``bench/results/*.json`` to ``docs/benchmarks.md``, with pictures: ``python -m bench.report``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_fast.files import atomic_write

from . import pictures
from .cases import OURS
from .growth import Curve, curves_of
from .harness import ROOT
from .machine import Machine
from .record import Record, Row, read_record

INTRODUCTION = Path(__file__).with_name("introduction.md")
FILES = {
    "route": "route",
    "plan": "plan",
    "gather_rows": "rows",
    "combine_rows": "rows",
    "expert MLP": "expert_mlp",
    "expert MLP beside dense": "expert_mlp",
    "privacy-filter experts": "privacy_filter",
    "MoE layer": "moe_mlp",
    "contrastive loss": "info_nce",
    "training step": "training_step",
    "embedding": "embedding",
    "natural step": "natural_step",
    "cached step": "cached_step",
    "import": "import_time",
}
"""The operation file of each operation's name."""
OTHERS = (OURS, "dense", "dense, compiled", "bare products")
"""Who is no alternative: ourselves, and what computes something else."""


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
    """The part of the page about one run; draws its pictures into ``images``."""
    parts = [f"## {name}\n", machine_lines(record)]
    single = [row for row in record.rows if row.sweep is None and row.peak_bytes is None]

    def picture(kind: str, sentence: str) -> str:
        return f"![{sentence}](images/bench-{name}-{kind}.png)\n\n{sentence}\n"

    def path(kind: str) -> Path:
        return images / f"bench-{name}-{kind}.png"

    best = best_of_others(single)
    if best:
        pictures.draw_best(best, path("best"))
        sentence = (
            "The fastest alternative that computes the same, per operation: the mean over all "
            "shapes, the line from least to most."
        )
        parts.append(picture("best", sentence))
    for number, (title, rows) in enumerate(groups(single).items()):
        repeat = f"python -m bench {FILES[rows[0].operation.partition(',')[0]]}"
        parts.append(f"### {title}\n\nRepeat: `{repeat}`\n")
        if any(row.ratio and row.who != row.baseline for row in rows):
            pictures.draw_ratios(rows, title, path(str(number)))
            sentence = f"How long each candidate takes, {rows[0].baseline} being 1: {title}."
            parts.append(picture(str(number), sentence))
        parts.append(table(rows))
    parts += growth_parts(record, path, picture)
    return "\n".join(parts)


def growth_parts(
    record: Record, path: Callable[[str], Path], picture: Callable[[str, str], str]
) -> list[str]:
    """Roofline, growth and memory, where they were measured."""
    parts = []
    if record.machine and any(r.who == OURS and r.work and r.work.flop for r in record.rows):
        pictures.draw_roofline(record.rows, record.machine, path("roofline"))
        sentence = "How near moe_fast comes to what this machine could do at best."
        parts += ["### The limit\n", picture("roofline", sentence)]
    if curves := curves_of(
        record.rows, lambda row: row.seconds.median * 1e3 if row.seconds else None
    ):
        pictures.draw_curves(curves, "ms", path("growth"))
        sentence = "How time grows with one size, the others fixed; in the legend the exponent."
        parts += [
            "### Growth\n\nRepeat: `python -m bench growth`\n",
            picture("growth", sentence),
            growth_table(curves),
        ]
    mebibytes = curves_of(record.rows, lambda row: row.peak_bytes and row.peak_bytes / 2**20)
    if mebibytes:
        pictures.draw_curves(mebibytes, "MiB beyond the inputs", path("memory"))
        sentence = "What one forward and backward takes beyond its inputs, in fresh processes."
        parts += [
            "### Memory\n\nRepeat: `python -m bench peak_memory`\n",
            picture("memory", sentence),
            memory_table(mebibytes),
        ]
    return parts


def machine_lines(record: Record) -> str:
    """On what, with what, and how quiet it was."""
    e = record.environment
    versions = ", ".join(f"{name} {v}" for name, v in e.get("versions", {}).items() if v)
    lines = [
        f"{e.get('cpu')}, {e.get('threads')} threads of {e.get('cpus')} processors; {versions}; "
        f"Python {e.get('python')}; commit {str(e.get('commit'))[:12]}; {e.get('time')}.\n"
    ]
    if record.machine:
        lines.append(f"{ceilings(record.machine)}\n")
    if record.noisy:
        lines.append(f"**A noisy run**: {'; '.join(record.noisy)}. Its figures deserve doubt.\n")
    return "\n".join(lines)


def ceilings(machine: Machine) -> str:
    """The limits in one sentence."""
    rates = ", ".join(f"{r / 1e9:.0f} GFLOP/s in {d}" for d, r in machine.matrix_rate.items())
    return (
        f"The machine's limits: {rates}; copying {machine.copy_bandwidth / 1e9:.1f} GB/s, reading "
        f"{machine.read_bandwidth / 1e9:.1f} GB/s."
    )


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by operation and dtype."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.operation}, {row.dtype}".removesuffix(", "), []).append(row)
    return found


def best_of_others(rows: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    """Per operation and dtype the fastest alternative: geometric mean, least and most of its ratio.

    :data:`OTHERS` are none.
    """
    best: dict[str, tuple[float, float, float]] = {}
    for title, members in groups(rows).items():
        cases: dict[tuple[str, str, str], float] = {}
        for row in members:
            if row.ratio and row.baseline == OURS and row.who not in OTHERS:
                cases[row.case] = min(cases.get(row.case, math.inf), row.ratio.median)
        if cases:
            ratios = list(cases.values())
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            best[title] = (mean, min(ratios), max(ratios))
    return best


def table(rows: Sequence[Row]) -> str:
    """A line per candidate and shape; who could not run, with the reason, once."""
    lines = [f"| shape | candidate | time over {rows[0].baseline}'s | ms | share of the floor |",
             "|---|---|---|---|---|"]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for row in rows:
        shape = " ".join(f"{k}={v}" for k, v in row.shape.items())
        if row.ratio and row.seconds:
            r, s = row.ratio, row.seconds
            share = f"{row.share_of_floor:.0%}" if row.share_of_floor else ""
            lines.append(
                f"| {shape} | {row.who} | {r.median:.2f} [{r.q1:.2f}, {r.q3:.2f}] "
                f"| {s.median * 1e3:.3g} | {share} |"
            )
        elif row.reason:
            reasons.setdefault(f"{row.who}: {row.reason}", []).append(shape)
    count = len({row.case for row in rows})
    notes = [
        f"- {reason}" + ("" if len(shapes) == count else f" ({'; '.join(shapes)})")
        for reason, shapes in reasons.items()
    ]
    return "\n".join([*lines, *(["", "Not run:", "", *notes] if notes else []), ""])


def growth_table(curves: Sequence[Curve]) -> str:
    """The fitted exponents."""
    lines = ["| operation | size | from, to | candidate | exponent |", "|---|---|---|---|---|"]
    for c in curves:
        span = f"{c.sizes[0]:,} .. {c.sizes[-1]:,}"
        error = "" if math.isnan(c.error) else f" ± {c.error:.2f}"
        lines.append(f"| {c.operation} | {c.letter} | {span} | {c.who} | {c.exponent:.2f}{error} |")
    return "\n".join([*lines, ""])


def memory_table(curves: Sequence[Curve]) -> str:
    """Peaks in MiB."""
    lines = ["| operation | size | candidate | MiB |", "|---|---|---|---|"]
    lines += [
        f"| {c.operation} | {c.letter}={size:,} | {c.who} | {value:.0f} |"
        for c in curves
        for size, value in zip(c.sizes, c.values, strict=True)
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
