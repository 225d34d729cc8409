"""What the demo writes: one table, the differences, results.json, table.md, two pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import moe_fast
from moe_fast.demo.docstrings import DOMAINS, SOURCES
from moe_fast.demo.settings import DemoSettings
from moe_fast.demo.systems import OWN_DOMAIN, System
from moe_fast.evaluation import bootstrap_interval, mean_scores, paired_difference
from moe_fast.evaluation.plots import plot_expert_usage, plot_losses
from moe_fast.evaluation.retrieval import Estimate
from moe_fast.files import atomic_write

BY_DOMAIN = ("nDCG@10", "MRR@10")
MEASURES = (*BY_DOMAIN, OWN_DOMAIN)


def versions() -> dict[str, str]:
    """Versions of everything the numbers depend on."""
    found = {"moe-fast": moe_fast.__version__, "python": platform.python_version()}
    for name in ("transformers", "sentence-transformers", "ir-measures"):
        found[name] = metadata.version(name)
    return found | {source.domain: source.version for source in SOURCES}


def summarise(system: System, domains: Sequence[str], settings: DemoSettings) -> dict[str, Any]:
    """One system's numbers, ready for JSON."""
    intervals = {
        name: asdict(bootstrap_interval(values, seed=settings.seed))
        for name, values in system.scores.items()
    }
    return {
        "name": system.name,
        "means": mean_scores(system.scores, domains),
        "overall": intervals,
        "active_parameters": system.active_parameters,
        "total_parameters": system.total_parameters,
        "train_pairs": system.train_pairs,
        "train_seconds": system.train_seconds,
        "losses": system.losses,
        "expert_usage": None if system.usage is None else system.usage.tolist(),
    }


def differences(
    systems: Sequence[System], baseline: System, settings: DemoSettings
) -> dict[str, dict[str, Any]]:
    """Mean difference of each system to the baseline over the same queries, with intervals."""
    return {
        f"{system.name} - {baseline.name}": {
            measure: asdict(
                paired_difference(
                    system.scores[measure], baseline.scores[measure], seed=settings.seed
                )
            )
            for measure in MEASURES
        }
        for system in systems
    }


def markdown_table(summaries: Sequence[dict[str, Any]]) -> str:
    """The one table, in Markdown: a system per row; a domain's cell is nDCG@10 / MRR@10."""
    header = ["system", *(f"{measure} [95 %]" for measure in MEASURES), *DOMAINS]
    header += ["active parameters", "total parameters", "training pairs", "training seconds"]
    rows = [header, ["---"] * len(header)]
    for summary in summaries:
        overall = [_estimate(Estimate(**summary["overall"][measure])) for measure in MEASURES]
        by_domain = [
            " / ".join(_number(summary["means"][domain][measure]) for measure in BY_DOMAIN)
            for domain in DOMAINS
        ]
        rows.append([summary["name"], *overall, *by_domain, *_costs(summary)])
    return _aligned(rows)


def markdown_differences(found: dict[str, dict[str, Any]]) -> str:
    """The paired differences as a second, small table."""
    rows = [
        ["difference", *(f"{measure} [95 %]" for measure in MEASURES)],
        ["---"] * (1 + len(MEASURES)),
    ]
    for name, measures in found.items():
        cells = [_estimate(Estimate(**measures[m]), signed=True) for m in MEASURES]
        rows.append([name, *cells])
    return _aligned(rows)


def _number(value: float, *, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.3f}".replace("0.", ".", 1)


def _estimate(value: Estimate, *, signed: bool = False) -> str:
    mean, low, high = (_number(x, signed=signed) for x in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _costs(summary: dict[str, Any]) -> list[str]:
    def millions(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:.1f} M"

    seconds = summary["train_seconds"]
    return [
        millions(summary["active_parameters"]),
        millions(summary["total_parameters"]),
        f"{summary['train_pairs']:,}" if summary["train_pairs"] else "-",
        "-" if seconds is None else f"{seconds:.0f}",
    ]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        fill = "-" if row[0] == "---" else " "
        cells = (cell.ljust(width, fill) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(output: Path, results: dict[str, Any]) -> None:
    """results.json: everything, to the last digit."""
    with atomic_write(output / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_table(output: Path, text: str) -> None:
    """table.md: what a README can take over."""
    with atomic_write(output / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")


def draw(output: Path, systems: Sequence[System]) -> None:
    """The two pictures, from the systems that have something to show."""
    usages = {system.name: system.usage for system in systems if system.usage is not None}
    plot_expert_usage(usages, DOMAINS, output / "expert_usage.png")
    losses = {system.name: system.losses for system in systems if system.losses}
    plot_losses(losses, output / "losses.png")
