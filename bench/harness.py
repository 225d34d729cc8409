"""How all benchmarks measure.

The candidates run in turn, in many rounds, in one process; if the machine slows down or speeds up,
it does so for all of them. Each round gives one ratio to the baseline. The figure to quote is the
median of these ratios; seconds are recorded too. The functions here do not check outputs: callers
do that first.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
FEWEST_ROUNDS = 5  # quartiles of fewer values mean nothing
PACKAGES = ("moe-fast", "torch", "transformers", "numpy", "triton", "sentence-transformers")


@dataclass(frozen=True)
class Summary:
    """Median and spread of ``count`` values.

    The spread is given by the quartiles. For several processes, it goes from the smallest first
    quartile to the largest third quartile.
    """

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarize one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    def shown(self, digits: int, times: float = 1.0) -> str:
        """Format median and spread: ``1.52 [1.50, 1.55]``."""
        median, q1, q3 = (f"{times * v:.{digits}f}" for v in (self.median, self.q1, self.q3))
        return f"{median} [{q1}, {q3}]"

    @classmethod
    def pooled(cls, processes: Sequence[Summary]) -> Summary:
        """Join one or more processes' summaries: the median of their medians, the whole spread."""
        return cls(
            statistics.median(summary.median for summary in processes),
            min(summary.q1 for summary in processes),
            max(summary.q3 for summary in processes),
            sum(summary.count for summary in processes),
        )


@dataclass(frozen=True)
class Result:
    """The time of one candidate, and its ratio to the baseline's time in the same round."""

    name: str
    ratio: Summary
    seconds: Summary


def alternate(
    samplers: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    warmup: int,
    max_seconds: float = math.inf,
) -> dict[str, list[T]]:
    """Call every sampler once per round, in a rotating order; return what they returned.

    Args:
        samplers: functions by name; each does its work once and returns its measurement.
        rounds: the number of rounds that are kept.
        warmup: the number of rounds before, which are not kept.
        max_seconds: no round begins later than this, once ``FEWEST_ROUNDS`` are kept.
    """
    names = list(samplers)
    samples: dict[str, list[T]] = {name: [] for name in names}
    deadline = time.monotonic() + max_seconds
    for round_index in range(-warmup, rounds):
        if round_index >= FEWEST_ROUNDS and time.monotonic() > deadline:
            break
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            sample = samplers[name]()
            if round_index >= 0:
                samples[name].append(sample)
    return samples


def summarize(samples: Mapping[str, Sequence[float]], baseline: str) -> list[Result]:
    """Compute results from equally many samples per name; the baseline's comes first.

    Raises:
        ValueError: ``baseline`` is not a name in ``samples``, or the counts differ or are zero.
    """
    if baseline not in samples:
        raise ValueError(f"baseline must be one of {list(samples)}; got {baseline!r}.")
    counts = {name: len(values) for name, values in samples.items()}
    if len(set(counts.values())) != 1 or not counts[baseline]:
        raise ValueError(f"samples must be equally many, one or more, per name; got {counts}.")
    base = samples[baseline]
    results = [
        Result(
            name,
            Summary.of([a / b for a, b in zip(values, base, strict=True)]),
            Summary.of(values),
        )
        for name, values in samples.items()
    ]
    return sorted(results, key=lambda result: result.name != baseline)


def race(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    rounds: int,
    warmup: int,
    min_sample_seconds: float,
    synchronize: Callable[[], None] = lambda: None,
    max_seconds: float = math.inf,
) -> list[Result]:
    """Time candidates whose outputs have been checked.

    Args:
        candidates: functions without arguments, by name.
        baseline: the name that ratios refer to.
        rounds, warmup, max_seconds: as in :func:`alternate`. Each candidate is called once before,
            to estimate how long a call takes.
        min_sample_seconds: a candidate that is faster than this is called several times per sample.
        synchronize: waits for the device, such as ``torch.cuda.synchronize``.
    """
    samplers = {
        name: _sampler(run, min_sample_seconds, synchronize) for name, run in candidates.items()
    }
    samples = alternate(samplers, rounds=rounds, warmup=warmup, max_seconds=max_seconds)
    return summarize(samples, baseline)


def _sampler(
    run: Callable[[], Any], min_sample_seconds: float, synchronize: Callable[[], None]
) -> Callable[[], float]:
    """Return a function that times ``run``; a short ``run`` is averaged over several calls."""

    def seconds(calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls = max(1, math.ceil(min_sample_seconds / max(seconds(1), 1e-9)))
    return lambda: seconds(calls)


def environment(**settings: Any) -> dict[str, Any]:
    """Return what figures depend on: versions, machine, load, commit; and ``settings``."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        **settings,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:(.+)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with ``+changes`` if the checkout differs from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(results: Sequence[Result], title: str) -> str:
    """Format results as text: ratios to the first one, then milliseconds, spreads in brackets."""
    width = max(len(result.name) for result in results)
    lines = [f"{title} (median of {results[0].seconds.count} rounds)"]
    lines.append(f"{'':{width}}  {f'x {results[0].name} [spread]':24}  ms [spread]")
    for r in results:
        lines.append(f"{r.name:{width}}  {r.ratio.shown(3):24}  {r.seconds.shown(2, 1e3)}")
    return "\n".join(lines)


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write ``record`` such that ``path`` holds either its old content or all of the new.

    Dataclasses in it are written as objects. Missing folders are created.
    """
    # Imported here because bench.gpu chooses Triton's interpreter before it imports moe_fast.
    from moe_fast.files import atomic_write

    text = json.dumps(record, indent=2, default=asdict) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
