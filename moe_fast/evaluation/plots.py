"""Draws where each domain's tokens go, and how training went."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_fast.evaluation.optional import require
from moe_fast.files import atomic_write

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
# wide to narrow and solid to dotted, so that curves on top of each other are all visible
_STYLES = (("-", 4.0), ("--", 2.2), (":", 2.2))


def plot_expert_usage(
    usages: Mapping[str, ArrayLike],
    domains: Sequence[str],
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
    layers: Sequence[int] | None = None,
) -> None:
    """Draw heat maps of the share of each domain's tokens that each expert received.

    There is one panel per model and layer. A model whose layers all have the same shares (enforced
    routing) gets one panel.

    Args:
        usages: {name of the model: [domain, layer, expert]}, from `expert_usage`.
        domains: the names of the domains, in the order of the arrays.
        path: the file to write, such as ``usage.png``; the suffix gives the format.
        columns: the number of panels side by side.
        layers: the numbers of the layers in the model, from 0, if not all of its layers have
            experts (a mixture's ``config.moe_layers``).

    Raises:
        ValueError: there are no usages, or an array does not match the domains or layers.
        ImportError: matplotlib is not installed.
    """
    panels = _usage_panels(usages, len(domains), layers)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    experts = max(shares.shape[1] for _, shares in panels)
    title_length = max(len(line) for title, _ in panels for line in title.splitlines())
    width = max(2.9, 0.42 * experts, 0.1 * title_length)  # inches; titles stand side by side
    height = max(3.1, 0.3 * len(domains) + 0.9)
    names = 0.07 * max(map(len, domains))  # inches, beside the first column
    figure = _new_figure((width * columns + 1.2 + names, height * rows + 0.7))
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
    """Draw loss curves in one picture: the raw values pale, and their running means on top.

    Args:
        curves: {name: [(x, loss), ...]}, with rising x.
        path: the file to write; the suffix gives the format.
        x_label, y_label: the labels of the axes.
        window: the number of values in the running mean (fewer at the start).

    Raises:
        ValueError: there are no curves, or one has no points.
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
    axis.set_xlabel(textwrap.fill(x_label, 80))
    axis.set_ylabel(textwrap.fill(y_label, 48))
    axis.set_title(
        f"Loss while training (thin: each step; thick: mean of the last {window} steps)",
        fontsize=12,
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, handlelength=4)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_training(
    log_history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    window: int = 10,
) -> None:
    """Draw the loss, in-batch accuracy and temperature of one training run over its steps.

    Each of the three that was logged has a panel, with the values of evaluation too if there are
    any. The axis at the top shows epochs.

    Args:
        log_history: the trainer's ``state.log_history``, also found in a checkpoint's
            ``trainer_state.json``: entries with ``step`` and some of ``loss``, ``eval_loss``,
            ``in_batch_accuracy``, ``eval_in_batch_accuracy``, ``temperature`` and ``epoch``.
        path: the file to write; the suffix gives the format.
        window: the number of values in the running mean drawn over training's raw values.

    Raises:
        ValueError: none of the three was logged.
        ImportError: matplotlib is not installed.
    """
    panels = [
        (title, curves) for title, *keys in _TRAINING if (curves := _curves(log_history, keys))
    ]
    if not panels:
        raise ValueError("log_history has none of loss, in_batch_accuracy and temperature to draw")
    figure = _new_figure((7.5, 2.4 * len(panels) + 1.0))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for name, points in curves.items():
            # a temperature moves slowly: its mean would only lag behind
            _draw_curve(axis, name, points, 1 if title == "temperature" else window)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1] != ["training"]:
            axis.legend(frameon=False)
    figure.suptitle(f"Training: {', '.join(title for title, _ in panels)}", fontsize=12)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    steps_per_epoch = _steps_per_epoch(log_history)
    if steps_per_epoch:
        top = axes[0].secondary_xaxis(
            "top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch)
        )
        top.set_xlabel("epoch")
    _save(figure, path)


# panels of a training log: title, key of training's values, key of evaluation's values
_TRAINING = (
    ("loss", "loss", "eval_loss"),
    ("in-batch accuracy", "in_batch_accuracy", "eval_in_batch_accuracy"),
    ("temperature", "temperature", ""),
)


def _curves(
    log_history: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Return {"training" or "evaluation": [(step, value), ...]} for those that were logged."""
    curves = {
        name: [(float(row["step"]), float(row[key])) for row in log_history if key in row]
        for name, key in zip(("training", "evaluation"), keys, strict=True)
    }
    return {name: points for name, points in curves.items() if points}


def _draw_curve(axis: Any, name: str, points: list[tuple[float, float]], window: int) -> None:
    x, values = np.asarray(points).T
    if name == "evaluation":
        axis.plot(x, values, "o-", color=_COLOURS[1], markersize=4, label=name)
    elif window == 1 or len(x) <= 2 * window:
        marker = "." if len(x) <= 20 else ""
        axis.plot(x, values, marker=marker, color=_COLOURS[0], label=name)
    else:
        axis.plot(x, values, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
        label = f"{name} (mean of the last {window} logs)"
        axis.plot(x, running_mean(values, window), color=_COLOURS[0], linewidth=2, label=label)


def _steps_per_epoch(log_history: Sequence[Mapping[str, Any]]) -> float | None:
    both = [row for row in log_history if row.get("epoch") and row.get("step")]
    return both[-1]["step"] / both[-1]["epoch"] if both else None


def running_mean(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Compute the mean of the last `window` values at each position (fewer at the start), [N]."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _usage_panels(
    usages: Mapping[str, ArrayLike], num_domains: int, numbers: Sequence[int] | None = None
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
        if numbers is not None and len(numbers) != layers:
            raise ValueError(f"layers={list(numbers)}: usages[{name!r}] has {layers} layers")
        if layers > 1 and np.allclose(shares, shares[:, :1]):
            panels.append((f"{name}\n{_alike(layers, numbers)}", shares[:, 0]))
            continue
        for i in range(layers):
            number = i if numbers is None else numbers[i]
            panels.append((f"{name}\nlayer {number}", shares[:, i]))
    if not panels:
        raise ValueError("usages is empty; nothing to draw")
    return panels


def _alike(layers: int, numbers: Sequence[int] | None) -> str:
    """Return the title of the one panel that is drawn for several layers with equal shares."""
    if numbers is None or len(numbers) > 6:
        return f"all {layers} layers alike"
    return f"layers {', '.join(map(str, numbers))} alike"


def _write_cells(axis: Any, shares: NDArray[np.float64]) -> None:
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.55 else "black"
        axis.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)


def _new_figure(size: tuple[float, float]) -> Any:
    """Make a figure for the Agg canvas, without a display and without pyplot's global state."""
    require("matplotlib.backends.backend_agg")
    return require("matplotlib.figure").Figure(figsize=size, layout="constrained", dpi=130)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    canvas = require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        # tight: parts that are wider than the figure, such as a long title, are not cropped
        canvas.print_figure(temporary, bbox_inches="tight", pad_inches=0.1)
