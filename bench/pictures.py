"""Draws the pictures of a run with matplotlib; each shows one thing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from moe_fast.files import atomic_write

from .cases import OURS
from .growth import Curve
from .machine import Machine
from .record import Row

COLOURS = {
    OURS: "#d62728",
    "eager": "#1f77b4",
    "batched_mm": "#6baed6",
    "grouped_mm": "#08306b",
    "eager loop": "#1f77b4",
    "per-expert products": "#2ca02c",
    "masked loop": "#98df8a",
    "reference": "#2ca02c",
    "dense": "#7f7f7f",
    "dense, compiled": "#c7c7c7",
}
OTHERS = ("#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e")
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def colour(who: str, seen: Sequence[str]) -> str:
    """Return a candidate's colour; those in ``COLOURS`` are the same in all pictures."""
    if who in COLOURS:
        return COLOURS[who]
    return OTHERS[[name for name in seen if name not in COLOURS].index(who) % len(OTHERS)]


def draw_ratios(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw bars from 1 (the baseline) to each ratio, grouped by shape, with spreads as lines."""
    ran = [row for row in rows if row.ratio and row.who != row.baseline]
    groups: dict[str, list[Row]] = {}
    for row in ran:
        groups.setdefault(shape_label(row, ran), []).append(row)
    names = list(dict.fromkeys(row.who for row in ran))
    figure = _figure(8.5, 1.5 + 0.2 * len(ran) + 0.3 * len(groups))
    axis = figure.subplots()
    place, ticks = 0.0, {}
    for label, members in groups.items():
        ticks[label] = place + (len(members) - 1) / 2
        for row in members:
            assert row.ratio
            r = row.ratio
            _bar(axis, place, r.median, (r.q1, r.q3), colour(row.who, names))
            place += 1
        place += 1
    axis.set_yticks(list(ticks.values()), list(ticks))
    axis.invert_yaxis()
    _ratio_axis(axis, f"time over {ran[0].baseline}'s (log scale); right of 1: slower than it")
    axis.set_title(title, fontsize=11)
    handles = [Patch(color=colour(name, names), label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def draw_best(best: Mapping[str, tuple[float, float, float]], path: Path) -> None:
    """Draw the ratio of the fastest alternative per operation: geometric mean, least and most."""
    figure = _figure(8.0, 1.6 + 0.42 * len(best))
    axis = figure.subplots()
    for place, (mean, least, most) in enumerate(best.values()):
        _bar(axis, place, mean, (least, most), "#1f77b4" if mean >= 1 else "#d62728", fontsize=9)
    axis.set_yticks(range(len(best)), list(best))
    axis.invert_yaxis()
    _ratio_axis(axis, "its time over moe_fast's (log scale); red: faster than moe_fast")
    axis.set_title("How much longer the best of the others takes", fontsize=11)
    _save(figure, path)


def _bar(
    axis: Any, place: float, value: float, spread: tuple[float, float], fill: str, fontsize: int = 7
) -> None:
    """Draw a bar from 1 to a ratio, its spread as a line, and its value behind them."""
    axis.barh(place, value - 1, left=1, height=0.8, color=fill)
    axis.hlines(place, *spread, color="black", linewidth=1.3)
    end = max(spread[1], value, 1.0)
    style = dict(textcoords="offset points", va="center", fontsize=fontsize)
    axis.annotate(f"{value:.2f}", (end, place), (4, 0), **style)


def draw_roofline(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """Draw the rate of ours below the limits of this machine."""
    figure = _figure(8.0, 5.2)
    axis = figure.subplots()
    ours = [row for row in rows if row.who == OURS and row.work and row.work.flop and row.seconds]
    intensities = [row.work.flop / row.work.moved for row in ours if row.work]
    low, high = min(intensities) / 2, max(intensities) * 2
    bandwidth = max(machine.copy_bandwidth, machine.read_bandwidth)
    for dtype, rate in machine.matrix_rate.items():
        knee = rate / bandwidth
        xs = sorted({low, *([knee] if low < knee < high else []), high})
        axis.plot(xs, [min(rate, bandwidth * x) / 1e9 for x in xs], color="black", linewidth=1)
        text = f"{dtype}: {rate / 1e9:.0f} GFLOP/s"
        axis.annotate(text, (high, rate / 1e9), (0, 4), textcoords="offset points",
                      ha="right", fontsize=9)  # fmt: skip
    operations = list(dict.fromkeys(row.operation for row in ours))
    for row, intensity in zip(ours, intensities, strict=True):
        assert row.work and row.seconds
        axis.scatter(
            intensity,
            row.work.flop / row.seconds.median / 1e9,
            color=OTHERS[operations.index(row.operation) % len(OTHERS)],
            marker=MARKERS.get(row.dtype, "x"),
            s=30,
            alpha=0.8,
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved",
             ylabel="GFLOP/s")  # fmt: skip
    axis.set_title("moe_fast under the limits of this machine (circles float32, squares bfloat16)",
                   fontsize=11)  # fmt: skip
    axis.grid(alpha=0.3)
    handles = [
        Patch(color=OTHERS[i % len(OTHERS)], label=name) for i, name in enumerate(operations)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)


def draw_curves(curves: Sequence[Curve], unit: str, path: Path) -> None:
    """Draw a panel per operation and size, with a line per candidate and its exponent."""
    panels = list(dict.fromkeys((curve.operation, curve.letter) for curve in curves))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(4.2 * columns, 3.9 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (operation, letter) in zip(axes, panels, strict=False):
        members = [c for c in curves if (c.operation, c.letter) == (operation, letter)]
        names = [c.who for c in members]
        for c in members:
            label = f"{c.who}: {c.exponent:.2f}"
            width = 2 if c.who == OURS else 1
            fill = colour(c.who, names)
            axis.plot(c.sizes, c.values, label=label, color=fill, marker=".", linewidth=width)
        axis.set_xscale("log", base=2)
        axis.set_xticks(members[0].sizes, [f"{n:,}" for n in members[0].sizes], fontsize=7)
        axis.set(yscale="log", xlabel=letter, ylabel=unit)
        axis.grid(alpha=0.3)
        _plain_log_ticks(axis.yaxis)
        axis.set_title(f"{operation}, over {letter}", fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _save(figure, path)


def shape_label(row: Row, rows: Sequence[Row]) -> str:
    """Return the sizes of ``row`` that differ among ``rows``; all of them if none differs."""
    varying = [k for k in row.shape if len({other.shape.get(k) for other in rows}) > 1]
    label = " ".join(f"{k}={row.shape[k]:,}" for k in varying or row.shape)
    return label or row.operation


def _plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis 1, 2, 5, 10 ...; its default labels are such as 6 x 10^1."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _ratio_axis(axis: Any, label: str) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.9), max(high * 1.15, 1.2))
    _plain_log_ticks(axis.xaxis)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    """Make a figure without pyplot, which needs a display and has global state."""
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png")
