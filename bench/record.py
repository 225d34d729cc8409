"""The file format of measurements: rows, one per candidate and case, in one JSON file per run.

    {"schema": 1, "environment": {...}, "machine": {...} | null, "load_after": ..., "noisy": [...],
     "rows": [{"operation": "expert_mlp, forward", "shape": {"T": 2048, ...}, "dtype": "float32",
               "who": "grouped_mm", "baseline": "moe_fast", "ratio": {...}, "seconds": {...}, ...}]}

A ratio is the time over that of the baseline in the same round; those of several processes are
pooled. A candidate that cannot run has a reason instead of figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .harness import Summary, environment, write_json
from .machine import Machine, load_average, noise, processor_share

SCHEMA = 1


@dataclass(frozen=True)
class Work:
    """The least work of an operation.

    Attributes:
        flop: the FLOP of its matrix products.
        moved: the bytes moved if each input is read once and each output is written once.
    """

    flop: float
    moved: float


@dataclass(frozen=True)
class Row:
    """One candidate in one case.

    Attributes:
        operation: what is computed, and in which direction.
        shape: the sizes by letter, as in :attr:`bench.problem.Shape.letters`.
        dtype: of the tensors.
        who: the candidate.
        baseline: the candidate that ``ratio`` refers to.
        ratio: its time over the baseline's; None if it did not run.
        seconds: its time.
        work: the least work of the operation.
        floor_seconds: the least time for that work on this machine.
        share_of_floor: floor over time. It is more than 1 if the data stay in a cache.
        sweep: the letter of ``shape`` that a series of cases varies.
        peak_bytes: its peak memory, if that was measured.
        instructions: the number of its instructions, if that was measured.
        figures: what else was measured of it, by name, such as the least cosine to float32.
        reason: why it did not run.
    """

    operation: str
    shape: dict[str, int]
    dtype: str
    who: str
    baseline: str
    ratio: Summary | None = None
    seconds: Summary | None = None
    work: Work | None = None
    floor_seconds: float | None = None
    share_of_floor: float | None = None
    sweep: str | None = None
    peak_bytes: int | None = None
    instructions: int | None = None
    figures: dict[str, float] | None = None
    reason: str | None = None

    @property
    def case(self) -> tuple[str, str, str]:
        """Operation, shape and dtype, which are the same for all candidates of a comparison."""
        return self.operation, " ".join(f"{k}={v}" for k, v in self.shape.items()), self.dtype

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """Make a row from its JSON object; ``TypeError`` if the fields do not fit."""
        plain = dict(values)
        for name in ("ratio", "seconds"):
            plain[name] = Summary(**plain[name]) if plain.get(name) else None
        plain["work"] = Work(**plain["work"]) if plain.get("work") else None
        return cls(**plain)


@dataclass
class Record:
    """One run."""

    environment: dict[str, Any]
    machine: Machine | None = None
    load_after: float | None = None
    noisy: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA


def pooled(rows: Sequence[Row]) -> Row:
    """Join several processes' rows of the same candidate and case to one row."""
    ran = [row for row in rows if row.ratio and row.seconds]
    if len(ran) < 2:
        return ran[0] if ran else rows[0]
    seconds = Summary.pooled([row.seconds for row in ran if row.seconds])
    return replace(
        ran[0],
        ratio=Summary.pooled([row.ratio for row in ran if row.ratio]),
        seconds=seconds,
        share_of_floor=ran[0].floor_seconds and ran[0].floor_seconds / seconds.median,
    )


class Recorder:
    """Collects the rows of a run; every :meth:`write` writes a complete file.

    Args:
        machine: the limits of the machine; None leaves out floors.
        settings: added to the environment.
    """

    def __init__(self, machine: Machine | None, **settings: Any) -> None:
        self._before = load_average()
        self._shares = [processor_share()]
        self._rows: dict[tuple[Any, ...], list[Row]] = {}
        self.record = Record(environment(**settings), machine)

    def add(self, rows: Sequence[Row], share: float | None = None) -> list[Row]:
        """Add ``rows``; pool them with other processes' rows of the same candidates and cases.

        Args:
            share: :func:`~bench.machine.processor_share` in the process that measured, right after;
                None measures it now, in this process.

        Returns:
            The pooled rows, in the order of ``rows``.
        """
        self._shares.append(processor_share() if share is None else share)
        keys = [(row.case, row.sweep, row.who) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            self._rows.setdefault(key, []).append(row)
        pools = {key: pooled(found) for key, found in self._rows.items()}
        self.record.rows = list(pools.values())
        return [pools[key] for key in keys]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all rows, and the current load."""
        self.record.load_after = load_average()
        self.record.noisy = noise(
            self._before, self.record.load_after, self._shares, torch.get_num_threads()
        )
        write_json(Path(path), asdict(self.record))


def append(path: str | os.PathLike[str], new: Record) -> None:
    """Add a record's rows to the one in ``path``, in place of its rows of the same cases.

    So one processor's record can be measured in parts. The environment becomes that of the last
    part; ``earlier_commits`` in it lists those of the others. Without a file, ``new`` is written.

    Raises:
        ValueError: ``path`` holds no record, or one of another processor or number of threads.
    """
    path = Path(path)
    if not path.exists():
        write_json(path, asdict(new))
        return
    old = read_record(path)
    for name in ("cpu", "threads"):
        was, now = old.environment.get(name), new.environment.get(name)
        if was != now:
            raise ValueError(f"{path} was measured with {name} {was!r}; this run has {now!r}.")
    measured = {(row.case, row.sweep) for row in new.rows}
    kept = [row for row in old.rows if (row.case, row.sweep) not in measured]
    commits = {*old.environment.get("earlier_commits", ()), old.environment.get("commit")}
    earlier = sorted(str(c) for c in commits - {new.environment.get("commit")})
    joined = replace(
        new,
        environment=new.environment | ({"earlier_commits": earlier} if earlier else {}),
        machine=old.machine or new.machine,
        noisy=list(dict.fromkeys([*(old.noisy if kept else ()), *new.noisy])),
        rows=kept + new.rows,
    )
    write_json(path, asdict(joined))


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read the record in ``path``.

    Raises:
        ValueError: the file is not a record, or has another schema; the message names it.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}; got {values['schema']!r}")
        machine = Machine(**values.pop("machine")) if values["machine"] else None
        rows = [Row.of(row) for row in values.pop("rows")]
        values.pop("machine", None)
        return Record(machine=machine, rows=rows, **values)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no measurements: {error!r}.") from error
