"""Runs cells; without --arm all that are missing. See :mod:`experiments.claims`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.claims import records
from experiments.claims.arms import ARMS, Setup
from experiments.claims.data import SETS, Data, load
from experiments.claims.measure import measure, predicted_domains
from experiments.claims.report import report
from experiments.claims.settings import Cell, Settings, all_cells
from experiments.mpnet import mpnet_folder
from moe_fast.demo.pretrained import go_offline, pretrained_folder

RESULTS = Path(__file__).parents[1] / "results" / "claims"
FOLDER = Path(__file__).parents[3] / "shared" / "data"
MODELS: dict[str, Callable[[], Path]] = {"minilm": pretrained_folder, "mpnet": mpnet_folder}


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(prog="experiments.claims", description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--data", choices=SETS)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(os.environ.get("MOE_FAST_SHARED_DATA", FOLDER)),
        help="the folder of the pairs (default: MOE_FAST_SHARED_DATA)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="run cells that are done, too")
    parser.add_argument("--report", action="store_true", help="only write the table and picture")
    given = parser.parse_args(arguments)
    if not given.report:
        go_offline()
        for cell in chosen(given.model, given.data, given.arm, given.seed):
            if given.overwrite or not (given.output / cell.file).exists():
                settings = Settings(seed=cell.seed, precision=given.precision)
                run(cell, MODELS[cell.model](), given.folder, given.output, settings)
                report(given.output)
    print(report(given.output))


def chosen(model: str | None, data: str | None, arm: str | None, seed: int | None) -> list[Cell]:
    """The cells of the plan that fit; one that is named in full need not be in the plan."""
    if arm is not None and data is not None and seed is not None:
        return [Cell(model or "minilm", data, arm, seed)]
    wanted = (model, data, arm, seed)
    return [
        cell
        for cell in all_cells()
        if all(w in (None, value) for w, value in zip(wanted, cell, strict=True))
    ]


def run(
    cell: Cell, model: Path, folder: Path, output: Path, settings: Settings, sets: Any = SETS
) -> None:
    """Train and measure one cell, and write its record."""
    print(f"\n{cell.file}", flush=True)
    data = load(cell.data, folder, settings.split_seed, sets)
    setup = Setup(model, data, settings)
    predicted = _predictions(cell, data, setup, output)
    trained = ARMS[cell.arm][1](setup)
    start = time.perf_counter()
    scores = measure(trained, data, predicted)
    seconds = time.perf_counter() - start
    record = records.record_of(cell, trained, scores, data, settings, seconds)
    records.write(output / cell.file, record)
    print(f"{cell.file}: {record['nDCG@10']}", flush=True)


def _predictions(cell: Cell, data: Data, setup: Setup, output: Path) -> list[str]:
    """The predicted domains of the questions, computed once for a model and data set.

    Raises:
        ValueError: the file that holds them is of other data.
    """
    path = output / f"{cell.model}-{cell.data}-questions.json"
    if not path.exists():
        first = Setup(setup.model, data, replace(setup.settings, seed=0))
        records.write(path, records.questions_of(data, *predicted_domains(first)))
    found = records.read(path)
    if found["sha256"] != records.fingerprint(data):
        raise ValueError(f"{path} is of other data; give another --output")
    return [found["domains"][int(place)] for place in records.numbers(found["predicted"])]


if __name__ == "__main__":
    main()
