"""Cases: candidates that compute the same, how they are checked, and the least work they need.

Each operation has a file (``bench/route.py``, ``bench/expert_mlp.py`` ...) that yields cases; this
file checks and times them. :func:`measure` lets the candidates run in turn, like everything in
:mod:`bench.harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .harness import Result, race, table
from .machine import Machine
from .record import Row, Work

OURS = "moe_fast"
SIZES = ("tiny", "quick", "default", "full")
"""How much a run measures: enough for a test, a first look, a page of results, everything."""
CANNOT_RUN = (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError)


class WrongResult(AssertionError):
    """A candidate computes something different from the reference."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of a case.

    Attributes:
        runs: functions by name; each does the work once and returns its outputs.
        check: takes the outputs by name, and raises :class:`WrongResult` if they are wrong.
        absent: candidates that cannot run here, with the reason.
        works: the work of candidates that must do less or more than the case says.
    """

    runs: dict[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], None]
    absent: dict[str, str] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One comparison; its tensors are made only when :attr:`prepare` is called.

    Attributes:
        operation, shape, dtype, work, sweep: as in :class:`bench.record.Row`.
        prepare: makes the candidates; :func:`measure` seeds the random state before.
        baseline: the candidate that ratios refer to.
    """

    operation: str
    shape: Mapping[str, int]
    dtype: str
    prepare: Callable[[], Candidates]
    work: Work | None = None
    sweep: str | None = None
    baseline: str = OURS

    def __str__(self) -> str:
        shape = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return f"{self.operation}, {shape}, {self.dtype}"


def measure(
    case: Case,
    machine: Machine | None = None,
    *,
    seconds: float = 6.0,
    rounds: int = 40,
    warmup: int = 0,
    min_sample_seconds: float = 0.005,
    synchronize: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Check the candidates of ``case``, then time them; the baseline's row comes first.

    If another candidate than the baseline raises at its first call, its row holds the error as its
    reason. An error of the baseline is raised.

    Args:
        machine: the ceilings for the rows' floors; None leaves out floors.
        seconds: no round begins later than this, once ``bench.harness.FEWEST_ROUNDS`` are done.
        rounds, warmup, min_sample_seconds, synchronize: as in :func:`bench.harness.race`.

    Raises:
        WrongResult: outputs are wrong; raised before anything is timed.
    """
    torch.manual_seed(0)
    candidates = case.prepare()
    outputs, absent = _outputs(candidates, case.baseline)
    candidates.check(outputs)
    runs = {name: candidates.runs[name] for name in outputs}
    del outputs  # free their memory before others are measured
    results = race(
        runs,
        baseline=case.baseline,
        rounds=rounds,
        warmup=warmup,
        min_sample_seconds=min_sample_seconds,
        synchronize=synchronize,
        max_seconds=seconds,
    )
    base = Row(case.operation, dict(case.shape), case.dtype, OURS, case.baseline,
               work=case.work, sweep=case.sweep)  # fmt: skip
    ran = [
        _timed(replace(base, work=candidates.works.get(r.name, case.work)), r, machine)
        for r in results
    ]
    return [*ran, *(replace(base, who=name, reason=reason) for name, reason in absent.items())]


def _outputs(candidates: Candidates, baseline: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Call every candidate once; return the outputs, and why the others failed, by name."""
    outputs, absent = {}, dict(candidates.absent)
    for name, run in candidates.runs.items():
        try:
            outputs[name] = run()
        except CANNOT_RUN as error:
            if name == baseline:
                raise
            absent[name] = f"fails: {' '.join(str(error).split())[:200]}"
    return outputs, absent


def _timed(row: Row, result: Result, machine: Machine | None) -> Row:
    least = share = None
    if machine and row.work:
        least = machine.floor_seconds(row.work.flop, row.work.moved, row.dtype)
        share = least and least / result.seconds.median
    return replace(
        row,
        who=result.name,
        ratio=result.ratio,
        seconds=result.seconds,
        floor_seconds=least,
        share_of_floor=share,
    )


def show(rows: Sequence[Row]) -> str:
    """Format the rows of one case: ratios, shares of the floor, and who could not run."""
    ran = [Result(row.who, row.ratio, row.seconds) for row in rows if row.ratio and row.seconds]
    lines = [table(ran, ", ".join(part for part in rows[0].case if part))]
    shares = [f"{row.who} {row.share_of_floor:.0%}" for row in rows if row.share_of_floor]
    if shares:
        lines.append(f"share of the floor: {', '.join(shares)}")
    lines += [f"{row.who}: not run, {row.reason}" for row in rows if row.reason]
    return "\n".join(lines)


def near(
    exact: Sequence[Any], tolerance: float, apart: Iterable[str] = ()
) -> Callable[[dict[str, Any]], None]:
    """Make a check that every candidate's outputs are close to ``exact``.

    Args:
        exact: the reference's outputs, in order; a list among them is compared as one vector.
        tolerance: the largest norm of the difference, relative to the norm of the exact output.
        apart: candidates with other inputs, whose outputs are checked for NaN only.
    """
    apart = set(apart)

    def check(outputs: dict[str, Any]) -> None:
        for name, tensors in outputs.items():
            if name in apart:
                if any(bool(_vector(t).isnan().any()) for t in tensors):
                    raise WrongResult(f"{name}: NaN.")
                continue
            for position, (t, e) in enumerate(zip(tensors, exact, strict=True)):
                if _shapes(t) != _shapes(e):
                    raise WrongResult(
                        f"{name}, output {position}: shape {_shapes(t)} for {_shapes(e)}."
                    )
                t, e = _vector(t).double(), _vector(e).double()
                error = ((t - e).norm() / e.norm()).item()
                if not error <= tolerance:
                    raise WrongResult(f"{name}, output {position}: error {error:.1e}.")

    return check


def _vector(output: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in output]) if isinstance(output, list) else output


def _shapes(output: Tensor | list[Tensor]) -> list[Any]:
    return [list(t.shape) for t in output] if isinstance(output, list) else list(output.shape)
