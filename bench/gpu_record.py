"""The record of ``bench.gpu``: written after every measurement, resumable, with a deadline.

    {"environment": {...}, "command": [...], "parts": {"kernels": {"up": {...}, ...}, ...}}

A measurement that failed has an "error", and one that was not made has "left out", with the reason.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .harness import write_json

GIVEN_UP, LEFT_OUT = "error", "left out"
# What follows the deadline at most: a measurement that does not end is cut off then.
GRACE = 15.0
CUT_OFF = 3  # the exit code then


class Results:
    """Collects measurements by part and name; every one of them is written at once.

    Args:
        path: the record. It is replaced as a whole: whoever reads it finds all or the old one.
        head: what the record begins with.
        seconds: how long the run may take; measurements that come later are left out.
        started: when the run began, by ``time.monotonic``.
        known: the parts of an earlier record. Its results are taken over, and not measured again.

    As a context manager it stops watching the time at the end, whatever happened.
    """

    def __init__(
        self,
        path: Path,
        head: Mapping[str, Any],
        seconds: float = math.inf,
        started: float | None = None,
        known: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.path, self._lock = path, threading.Lock()
        self._started = time.monotonic() if started is None else started
        self._end = self._started + seconds
        self._known = {p: {n: v for n, v in found.items() if made(v)} for p, found in
                       (known or {}).items()}  # fmt: skip
        self.parts: dict[str, dict[str, Any]] = {p: dict(found) for p, found in self._known.items()}
        self.record: dict[str, Any] = {**head, "parts": self.parts}
        self._watch = threading.Timer(max(0.0, self.left() + GRACE), self._cut_off)
        self._watch.daemon = True
        if seconds < math.inf:
            self._watch.start()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.cancel()

    def left(self) -> float:
        """Seconds until the deadline; none of them may be left."""
        return self._end - time.monotonic()

    def measure(self, part: str, name: str, run: Callable[[], Any], least: float = 0.0) -> Any:
        """Return what ``run`` returns, and record it; or what an earlier record has.

        Args:
            least: do not begin with less time than this.
        """
        measurements = self.parts.setdefault(part, {})
        if name in self._known.get(part, {}):
            value = self._known[part][name]
        elif self.left() <= least:
            value = {LEFT_OUT: f"{max(0, self.left()):.0f} s were left before the deadline"}
        else:
            measurements[name] = {LEFT_OUT: "the run ended while this was measured"}
            value = attempt(run)
        self.note(part, name, value)
        print(f"{part}, {name}: {_short(value)}", flush=True)
        return value

    def note(self, part: str, name: str, value: Any) -> None:
        """Record a value, or replace the one that was recorded."""
        with self._lock:
            self.parts.setdefault(part, {})[name] = value
            self._write()

    def _write(self) -> None:
        self.record["seconds"] = time.monotonic() - self._started
        write_json(self.path, self.record)

    def finish(self) -> list[str]:
        """Write the record a last time; return the names of what failed."""
        with self._lock:
            self._write()
        return [
            f"{part}, {name}"
            for part, found in self.parts.items()
            for name, value in found.items()
            if failed(value)
        ]

    def _cut_off(self) -> None:
        """End the process: something has not ended long after the deadline, such as a kernel."""
        with self._lock:
            self._write()
            print(f"{self.path}: cut off at the deadline", file=sys.stderr, flush=True)
            os._exit(CUT_OFF)


def process_age() -> float:
    """Seconds since this process began, its imports included; 0 where Linux does not say it."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - begun)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def made(value: Any) -> bool:
    """Whether a recorded value is a result, and not an error or the reason why there is none."""
    return not (isinstance(value, Mapping) and (GIVEN_UP in value or LEFT_OUT in value))


def failed(value: Any) -> bool:
    """Whether a recorded value is an error, lists failures, or contains one that does."""
    if not isinstance(value, Mapping):
        return False
    return GIVEN_UP in value or bool(value.get("failures")) or any(map(failed, value.values()))


def attempt(run: Callable[[], Any]) -> Any:
    """Return the result of ``run``, or the error it raises, so that what follows still runs."""
    try:
        return run()
    except Exception as error:
        return {GIVEN_UP: "".join(traceback.format_exception(error))}


def read_parts(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return the parts of a record.

    Raises:
        ValueError: the file is no such record; the message names it.
    """
    try:
        parts = json.loads(Path(path).read_text(encoding="utf-8"))["parts"]
        if not all(isinstance(found, dict) for found in parts.values()):
            raise TypeError("parts must be objects")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of bench.gpu: {error!r}.") from error
    return parts


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=vars)
    return text if len(text) <= 600 else f"{text[:600]} ..."
