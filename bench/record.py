"""The form of every measurement: rows, one per candidate and case, in one JSON file per run.

    {"schema": 1, "environment": {...}, "machine": {...} | null, "load_after": ..., "noisy": [...],
     "rows": [{"operation": "expert_mlp, forward", "shape": {"T": 2048, ...}, "dtype": "float32",
               "who": "grouped_mm", "baseline": "moe_fast", "ratio": {...}, "seconds": {...}, ...}]}

Ratios are times over the baseline's in the same round, those of several processes pooled. A
candidate that cannot run has a reason instead of figures.
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
    """The least that an operation does.

    Attributes:
        flop: of its matrix products.
        moved: bytes, each input read once and each output written once.
    """

    flop: float
    moved: float


@dataclass(frozen=True)
class Row:
    """One candidate in one case.

    Attributes:
        operation: what is computed, and in which direction.
        shape: by the letters of the specification.
        dtype: of the tensors.
        who: the candidate.
        baseline: the candidate that ``ratio`` refers to.
        ratio: its time over the baseline's, None if it did not run.
        seconds: its time.
        work: the least that the operation does.
        floor_seconds: the least time for that on this machine.
        share_of_floor: floor over time. More than 1 where the data stay in a cache.
        sweep: the letter of ``shape`` that a series of cases varies.
        peak_bytes: memory of its own at its highest, where that is what was measured.
        instructions: that it executes, where that is what was measured.
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
    reason: str | None = None

    @property
    def case(self) -> tuple[str, str, str]:
        """What is the same for all candidates of one comparison: operation, shape, dtype."""
        return self.operation, " ".join(f"{k}={v}" for k, v in self.shape.items()), self.dtype

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """A row from its JSON object. Raises TypeError for one of another form."""
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
    """One row of several processes' rows of the same candidate in the same case."""
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
    """Collects the rows of a run; every :meth:`write` leaves a whole file.

    Args:
        machine: the ceilings; None leaves out floors.
        settings: added to the environment.
    """

    def __init__(self, machine: Machine | None, **settings: Any) -> None:
        self._before = load_average()
        self._shares = [processor_share()]
        self._rows: dict[tuple[Any, ...], list[Row]] = {}
        self.record = Record(environment(**settings), machine)

    def add(self, rows: Sequence[Row], share: float | None = None) -> list[Row]:
        """Keep ``rows``, pooled with those that other processes measured of the same.

        Args:
            share: :func:`~bench.machine.processor_share` right after them, of the process that
                measured them; None: it is this one, and measured now.

        Returns:
            what is now known of them.
        """
        self._shares.append(processor_share() if share is None else share)
        keys = [(row.case, row.sweep, row.who) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            self._rows.setdefault(key, []).append(row)
        pools = {key: pooled(found) for key, found in self._rows.items()}
        self.record.rows = list(pools.values())
        return [pools[key] for key in keys]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what there is, with the load as it is now."""
        self.record.load_after = load_average()
        self.record.noisy = noise(
            self._before, self.record.load_after, self._shares, torch.get_num_threads()
        )
        write_json(Path(path), asdict(self.record))


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record in ``path``.

    Raises:
        ValueError: if it is no record, or one of another schema; it names the file.
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
