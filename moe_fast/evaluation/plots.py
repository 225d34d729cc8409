"""Two pictures: where each domain's tokens go, and how the losses fell."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_fast.evaluation.optional import require
from moe_fast.files import atomic_write

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
# wide to narrow and solid to dotted, so that curves on top of each other all show
_STYLES = (("-", 4.0), ("--", 2.2), (":", 2.2))


def plot_expert_usage(
    usages: Mapping[str, ArrayLike],
    domains: Sequence[str],
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
) -> None:
    """Heat maps of the share of each domain's tokens that each expert got.

    One panel per model and layer; a model whose layers all agree (enforced routing) gets one panel.

    Args:
        usages: {name of the model: [domain, layer, expert]}, from `expert_usage`.
        domains: names of the rows.
        path: file to write, e.g. ``usage.png``; the suffix gives the format.
        columns: panels side by side.

    Raises:
        ValueError: no usages, or an array that does not fit the domains.
        ImportError: matplotlib is not installed.
    """
    panels = _usage_panels(usages, len(domains))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = _new_figure((2.9 * columns + 1.2, 3.1 * rows + 0.7))
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    image = None
    for index, (axis, (title, shares)) in enumerate(zip(axes, panels, strict=False)):
        image = axis.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        _write_cells(axis, shares)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(shares.shape[1]), [str(e) for e in range(shares.shape[1])])
        axis.set_xlabel("expert")
        axis.tick_params(length=0)
        first_in_row = index % columns == 0
        axis.set_yticks(range(len(domains)), list(domains) if first_in_row else [""] * len(domains))
        if first_in_row:
            axis.set_ylabel("domain of the text")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle("Where each domain's tokens go (each row sums to 100 %)", fontsize=12)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02)
    bar.set_label("share of the domain's tokens")
    _save(figure, path)


def plot_losses(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    x_label: str = "training pairs seen",
    y_label: str = "training loss (InfoNCE)",
    window: int = 10,
) -> None:
    """Loss curves in one picture: the raw values pale, their running mean on top.

    Args:
        curves: {name: [(x, loss), ...]}, x rising.
        path: file to write.
        x_label, y_label: what the axes show.
        window: values in the running mean (the last ones; fewer at the start).

    Raises:
        ValueError: no curves, or one without points.
        ImportError: matplotlib is not installed.
    """
    empty = [name for name, points in curves.items() if not len(points)]
    if not curves or empty:
        raise ValueError(f"curves: nothing to draw for {empty or 'an empty mapping'}")
    figure = _new_figure((7.5, 4.5))
    axis = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        x, loss = np.asarray(points, dtype=np.float64).T
        colour = _COLOURS[index % len(_COLOURS)]
        style, width = _STYLES[index % len(_STYLES)]
        axis.plot(x, loss, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(x, running_mean(loss, window), style, color=colour, linewidth=width, label=name)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_title(
        f"Loss while training (thin: each step; thick: mean of the last {window} steps)",
        fontsize=12,
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, handlelength=4)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def running_mean(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Mean of the last `window` values at each position, of all so far at the start. [N] -> [N]."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _usage_panels(
    usages: Mapping[str, ArrayLike], num_domains: int
) -> list[tuple[str, NDArray[np.float64]]]:
    panels = []
    for name, usage in usages.items():
        shares = np.asarray(usage, dtype=np.float64)
        if shares.ndim != 3 or shares.shape[0] != num_domains:
            raise ValueError(
                f"usages[{name!r}] must be [domain, layer, expert] with {num_domains} domains; got "
                f"shape {shares.shape}"
            )
        layers = shares.shape[1]
        if layers > 1 and np.allclose(shares, shares[:, :1]):
            panels.append((f"{name}\nall {layers} layers alike", shares[:, 0]))
        else:
            panels += [(f"{name}\nlayer {i + 1} of {layers}", shares[:, i]) for i in range(layers)]
    if not panels:
        raise ValueError("usages is empty; nothing to draw")
    return panels


def _write_cells(axis: Any, shares: NDArray[np.float64]) -> None:
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.55 else "black"
        axis.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)


def _new_figure(size: tuple[float, float]) -> Any:
    """A figure for the Agg canvas: needs no display, leaves pyplot's global state alone."""
    require("matplotlib.backends.backend_agg")
    return require("matplotlib.figure").Figure(figsize=size, layout="constrained", dpi=130)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    canvas = require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        canvas.print_figure(temporary)
