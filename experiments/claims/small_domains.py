"""What domains with few training pairs gain or lose by experts, from the records alone.

    python -m experiments.claims.small_domains

Reads the records of the data sets ``small0`` to ``small2``, in each of which four domains of
MedQuAD are cut down to 20, 50, 100 and 300 pairs, and writes ``small_domains.md``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.claims.__main__ import RESULTS
from experiments.claims.arms import ARMS
from experiments.claims.data import SETS
from experiments.claims.records import numbers, read
from experiments.claims.report import DENSE, difference, interval, markdown
from experiments.claims.settings import PLACES
from moe_fast.files import write_text

SEARCHED = ("own domain", "everything")
FULL = "all that there are"


class Part(NamedTuple):
    """The questions of the domains of one size, in one record: gains over dense, and groups."""

    gains: dict[str, NDArray[np.float64]]
    groups: list[str]


def parts_of(folder: Path) -> dict[tuple[str, int | str], list[Part]]:
    """By arm and number of pairs, what the records hold, compared with the dense arm's."""
    found: dict[tuple[str, int | str], list[Part]] = defaultdict(list)
    for name, sources in SETS.items():
        sizes = sources[0].most
        path = folder / f"minilm-{name}-questions.json"
        if sizes is None or not path.exists():
            continue
        questions = read(path)
        domains = [questions["domains"][int(i)] for i in numbers(questions["domain"])]
        groups = [f"{int(g)}" for g in numbers(questions["group"])]
        for arm, gains in _gains(folder, name):
            for size in (*sizes.values(), FULL):
                own = [i for i, d in enumerate(domains) if sizes.get(d, FULL) == size]
                kept = {place: values[own] for place, values in gains.items()}
                found[arm, size].append(Part(kept, [f"{name} {groups[i]}" for i in own]))
    return found


def _gains(folder: Path, name: str) -> Iterator[tuple[str, dict[str, NDArray[np.float64]]]]:
    """Each arm but dense, and its nDCG@10 less dense's with the same seed, [Q] by place."""
    for arm in ARMS:
        for path in sorted(folder.glob(f"minilm-{name}-{arm}-?.json")):
            dense = folder / path.name.replace(f"-{arm}-", f"-{DENSE}-")
            if arm == DENSE or not dense.exists():
                continue
            first, second = read(path)["per question"], read(dense)["per question"]
            yield arm, {p: numbers(first[p]) - numbers(second[p]).astype(float) for p in PLACES}


def report(folder: Path) -> str:
    """Write ``small_domains.md`` beside the folder of the records; return the text."""
    heads = ["arm", "pairs of the domain", "domains", "questions", *SEARCHED]
    rows = []
    for (arm, size), parts in parts_of(folder).items():
        names = [name for part in parts for name in part.groups]
        groups = np.unique(names, return_inverse=True)[1].astype(np.int64)
        cells = [f"({arm}) {ARMS[arm][0]}", str(size), str(len(parts)), f"{len(names):,}"]
        for place in SEARCHED:
            gains = np.concatenate([part.gains[place] for part in parts])
            nothing = np.zeros_like(gains)
            cells.append(
                interval(difference({0: {place: gains}}, {0: {place: nothing}}, place, groups))
            )
        rows.append(cells)
    text = (
        "nDCG@10 less that of the dense model trained on the same pairs; paired 95 % intervals, by "
        "what the questions are about.\n\n" + "\n".join(markdown(heads, rows)) + "\n"
    )
    write_text(folder.parent / "small_domains.md", text)
    return text


if __name__ == "__main__":
    print(report(RESULTS))
