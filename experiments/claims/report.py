"""The table and the picture, from the records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.claims.arms import ARMS
from experiments.claims.records import numbers, read
from experiments.claims.settings import PLACES
from moe_fast.evaluation.bootstrap import bootstrap_bounds
from moe_fast.files import atomic_write, write_text

PRETRAINED, DENSE = "a", "b"
EQUAL = 0.005  # two arms count as equal if the whole interval lies within this of 0

Scores = dict[str, dict[int, dict[str, NDArray[np.float32]]]]  # [arm][seed][place] -> [Q]


@dataclass(frozen=True)
class Difference:
    """The paired difference of two arms, the mean over their common seeds.

    Attributes:
        value, low, high: the mean over questions, and its 95 % interval. Groups of questions are
            resampled, since questions about the same disease are not independent.
        seeds: the difference of each seed.
        detectable: the smallest difference that so many questions show in four of five
            experiments (2.8 standard errors).
        questions_needed: how many questions would make the interval half as wide as `EQUAL`'s
            range, if the spread stays the same.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]
    detectable: float
    questions_needed: int

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.low >= -EQUAL and self.high <= EQUAL:
            return "equal"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not decided"


def difference(
    first: Mapping[int, Mapping[str, NDArray[np.float32]]],
    second: Mapping[int, Mapping[str, NDArray[np.float32]]],
    place: str,
    groups: NDArray[np.int64],
) -> Difference:
    """Compare two arms on the seeds that both have."""
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    by_seed = np.stack([a[place].astype(np.float64) - b[place] for a, b in pairs])
    per_question = by_seed.mean(0)
    sums = np.bincount(groups, per_question)
    sizes = np.bincount(groups)

    def mean(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return (sums[rows].sum(1) / sizes[rows].sum(1))[None]

    low, high = bootstrap_bounds([np.arange(len(sums))], mean)
    # the error of a mean over groups of different sizes, as for a ratio of two sums
    value = float(per_question.mean())
    error = float(np.sqrt(((sums - value * sizes) ** 2).sum()) / sizes.sum())
    needed = len(per_question) * (1.96 * error / EQUAL) ** 2
    return Difference(
        value,
        float(low[0]),
        float(high[0]),
        tuple(by_seed.mean(1)),
        2.8 * error,
        int(np.ceil(needed)),
    )


def report(folder: Path) -> str:
    """Write ``claims.md`` and ``claims.png`` beside the folder of the records; return the text."""
    parts, panels = [], {}
    for name, (questions, scores) in _collected(folder).items():
        groups = numbers(questions["group"]).astype(np.int64)
        table, gains = _table(name, questions, scores, groups)
        parts.append(table)
        panels[name] = gains
    text = "\n".join(parts) or "No records yet.\n"
    write_text(folder.parent / "claims.md", text)
    if any(panels.values()):
        _draw(panels, folder.parent / "claims.png")
    return text


def _collected(folder: Path) -> dict[str, tuple[dict[str, Any], Scores]]:
    """By model and data set, what the questions share, and the scores of the cells that are done.

    Raises:
        ValueError: a record belongs to other data than the questions' file.
    """
    found = {}
    for file in sorted(folder.glob("*-questions.json")):
        name = file.name.removesuffix("-questions.json")
        if name.split("-")[1].startswith("small"):
            continue  # a table of its own, see small_domains
        questions, scores = read(file), defaultdict(dict)
        for path in sorted(folder.glob(f"{name}-*-?.json")):
            record = read(path)
            if record["data sha256"] != questions["sha256"]:
                raise ValueError(f"{path} is of other data than {file}; remove one of the two")
            per_question = record["per question"]
            scores[record["arm"]][record["seed"]] = {p: numbers(per_question[p]) for p in PLACES}
        found[name] = questions, dict(scores)
    return found


def _table(
    name: str, questions: dict[str, Any], scores: Scores, groups: NDArray[np.int64]
) -> tuple[str, dict[str, dict[str, Difference]]]:
    heads = ["arm", "seeds", *PLACES, *(f"gain over dense, {place}" for place in PLACES)]
    rows, gains = [], {}
    for arm in (arm for arm in ARMS if arm in scores):
        cells = [f"({arm}) {ARMS[arm][0]}", str(len(scores[arm]))]
        for place in PLACES:
            values = [float(found[place].mean()) for found in scores[arm].values()]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        dense, own = scores.get(DENSE, {}), scores[arm]
        if arm == PRETRAINED:  # nothing in it is random: the same with every seed
            own = dict.fromkeys(dense, next(iter(own.values())))
        if arm != DENSE and own.keys() & dense.keys():
            gains[arm] = {p: difference(own, dense, p, groups) for p in PLACES}
        for place in PLACES:
            cells.append(interval(gains[arm][place]) if arm in gains else "-")
        rows.append(cells)
    lines = [f"## {name}", "", _sizes(questions), "", *markdown(heads, rows)]
    if {"c", "e"} <= scores.keys() and scores["c"].keys() & scores["e"].keys():
        lines += ["", *_prefix_against_mixture(scores, groups)]
    return "\n".join(lines) + "\n", gains


def _sizes(questions: dict[str, Any]) -> str:
    accuracy = questions["accuracy of the predictor"]
    return (
        f"{questions['training pairs']:,} training pairs, {questions['questions']:,} questions, "
        f"{questions['documents']:,} documents, {len(questions['domains'])} domains; the domain of "
        f"a held-out question is predicted correctly for {accuracy['questions']:.3f}, that of a "
        f"document for {accuracy['documents']:.3f}. nDCG@10, mean over seeds (least to greatest); "
        "paired 95 % intervals over questions, by what they are about."
    )


def _prefix_against_mixture(scores: Scores, groups: NDArray[np.int64]) -> list[str]:
    """Arm (e) minus arm (c): what experts gain over naming the domain."""
    heads = ["(e) - (c)", "difference", "by seed", "detectable", "verdict"]
    rows = []
    for place in PLACES:
        found = difference(scores["e"], scores["c"], place, groups)
        verdict = found.verdict
        if verdict == "not decided":
            verdict += f" ({found.questions_needed:,} questions would decide)"
        seeds = ", ".join(f"{value:+.3f}" for value in found.seeds)
        rows.append([place, interval(found), seeds, f"{found.detectable:.3f}", verdict])
    return markdown(heads, rows)


def interval(found: Difference) -> str:
    """A difference with its interval, as a cell of a table."""
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _draw(panels: Mapping[str, Mapping[str, Mapping[str, Difference]]], path: Path) -> None:
    """The gain over dense by arm, a panel for each data set and place."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = {name: gains for name, gains in panels.items() if gains}
    most = max(len(gains) for gains in shown.values())
    size = (4.2 * len(PLACES) + 2.5, (0.35 * most + 1.2) * len(shown))
    figure, axes = pyplot.subplots(
        len(shown), len(PLACES), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for row, (name, gains) in zip(axes, shown.items(), strict=True):
        arms = list(gains)[::-1]
        for axis, place in zip(row, PLACES, strict=True):
            found = [gains[arm][place] for arm in arms]
            values = np.array([d.value for d in found])
            bars = np.array([[d.value - d.low, d.high - d.value] for d in found]).T
            axis.axvspan(-EQUAL, EQUAL, color="0.9")
            axis.axvline(0, color="0.4", linewidth=0.8)
            axis.errorbar(values, range(len(arms)), xerr=np.maximum(bars, 0), fmt="o", capsize=3)
            axis.set_yticks(range(len(arms)), [f"({arm}) {ARMS[arm][0]}" for arm in arms])
            axis.set_title(f"{name}: {place}", fontsize=9)
            axis.set_xlabel("nDCG@10, gain over dense")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
