"""What a bad input is, how it is tried, and how its end is judged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLEAR, UNCLEAR, ACCEPTED = "clear error", "unclear error", "accepted"
TIMED_OUT, SIGNALLED = "time-out", "signal"
OUTCOMES = (CLEAR, UNCLEAR, ACCEPTED, TIMED_OUT, SIGNALLED)
# Errors that a library raises on purpose; any other shows that nobody thought of this.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)
_LONGEST = 3000


@dataclass(frozen=True)
class Case:
    """One bad input, or a control: a strange one that is right.

    Attributes:
        group: what kind of thing is damaged.
        name: what was done to it; unique with the group.
        base: file or folder of the bases that is copied; "" for calls without files.
        damage: spoils the copy.
        use: reads the copy as a user's program would.
        named: words one of which a clear error has in it; empty: the copy's own name.
        control: whether this is right and must be accepted.
    """

    group: str
    name: str
    base: str
    damage: Callable[[Path], Any]
    use: Callable[[Path], Any]
    named: tuple[str, ...] = ()
    control: bool = False


@dataclass(frozen=True)
class Result:
    """How a case ended: one of OUTCOMES, what was said, and after how long by the clock."""

    group: str
    name: str
    control: bool
    outcome: str
    message: str
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """A clear error, or for a control no error."""
        return self.outcome == (ACCEPTED if self.control else CLEAR)


def try_case(case: Case, bases: Path, folder: Path) -> Result:
    """Copy, damage, use, judge."""
    copy = folder / (case.base or "nothing")
    source = bases / (case.base or "nothing")
    if source.exists():  # else the damage makes the file
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    case.damage(copy)
    begin = clock()
    try:
        case.use(copy)
    except MemoryError as error:
        outcome, message = UNCLEAR, f"MemoryError: {error}"
    except Exception as error:
        notes = " ".join([str(error), *getattr(error, "__notes__", ())])
        named = case.named or (copy.name,)
        fits = isinstance(error, _EXPECTED) and any(word in notes for word in named)
        outcome = CLEAR if fits and len(notes) <= _LONGEST else UNCLEAR
        message = f"{type(error).__name__}: {notes}"
    else:
        outcome, message = ACCEPTED, ""
    seconds = clock() - begin
    return Result(case.group, case.name, case.control, outcome, message[:_LONGEST], seconds)


def clock(process: int | str = "self") -> float:
    """Seconds by the clock, less those in which a process stood in line for a processor.

    Sleeping counts, a busy machine does not; where the kernel does not say, it is the plain clock.
    """
    try:
        waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    except (OSError, IndexError):
        waited = 0
    return time.monotonic() - waited / 1e9


def all_cases() -> list[Case]:
    """Every case, in an order of its own."""
    from tests.hostile import calls, data, models

    cases = [*models.cases(), *data.cases(), *calls.cases()]
    names = [(case.group, case.name) for case in cases]
    assert len(set(names)) == len(names), "two cases of one name"
    return cases


def nothing(path: Path) -> None:
    """No damage."""


def damaged_bytes() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """What happens to a file of any format."""

    def change(edit: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(edit(path.read_bytes()))

    yield "empty", change(lambda b: b"")
    yield "first half", change(lambda b: b[: len(b) // 2])
    yield "last bytes cut", change(lambda b: b[:-7])
    yield "first byte cut", change(lambda b: b[1:])
    yield "zeros", change(lambda b: bytes(len(b)))
    yield "another format", change(lambda b: b"\x89PNG\r\n\x1a\n" + b[8:])
    yield "UTF-16", change(lambda b: "{}".encode("utf-16") + b)
    yield "a folder", lambda path: (path.unlink(), path.mkdir())
    yield "not there", lambda path: path.unlink()
