"""Compare two runs: ``python -m bench.compare OLD NEW``; exit code 1 if a case became slower.

It does not compare times, but ratios to the other candidates (peers) of the same run, so the two
machines may differ. A case is slower relative to a peer if the spread of the new ratio, ours over
the peer, lies completely above the old one, and the medians differ by a factor of ``--least``.
Because peers can change too, a case counts as slower only if more than half of its peers agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .cases import OURS
from .harness import Summary
from .record import Record, Row, read_record

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """The ratio of ours to one peer, in the old run and in the new one."""

    peer: str
    old: Summary
    new: Summary

    @property
    def factor(self) -> float:
        """The new ratio over the old one: how many times slower ours became."""
        return self.new.median / self.old.median

    @property
    def agrees(self) -> bool:
        """Whether the spreads of both ratios overlap."""
        return self.new.q1 <= self.old.q3 and self.old.q1 <= self.new.q3

    def slower(self, least: float) -> bool:
        """Whether ours became slower, beyond the spread and by a factor of ``least``."""
        return self.new.q1 > self.old.q3 and self.factor >= least


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs.

    Attributes:
        changes: by case, for the cases and peers that both runs have.
        only_old, only_new: cases that only one of the runs has.
    """

    changes: dict[Key, list[Change]]
    only_old: list[Key]
    only_new: list[Key]

    def slower(self, least: float) -> dict[Key, list[Change]]:
        """Return the cases that became slower relative to more than half of their peers."""
        return {
            key: changes
            for key, changes in self.changes.items()
            if 2 * sum(change.slower(least) for change in changes) > len(changes)
        }

    def agreement(self) -> tuple[int, int]:
        """Return how many ratios agree within their combined spread, and how many there are."""
        agrees = [change.agrees for changes in self.changes.values() for change in changes]
        return sum(agrees), len(agrees)


def compare_records(old: Record, new: Record) -> Comparison:
    """Pair the ratios of two runs by case and peer."""
    then, now = _ratios(old), _ratios(new)
    changes = {
        key: [Change(peer, old, now[key][peer]) for peer, old in peers.items() if peer in now[key]]
        for key, peers in then.items()
        if key in now
    }
    return Comparison(
        {key: found for key, found in changes.items() if found},
        [key for key in then if key not in now],
        [key for key in now if key not in then],
    )


def _ratios(record: Record) -> dict[Key, dict[str, Summary]]:
    """Return the ratios of ours to each peer, by case."""
    found: dict[Key, dict[str, Summary]] = {}
    for row in record.rows:
        for peer, ratio in _ours_over_peer(row):
            found.setdefault(row.case, {})[peer] = ratio
    return found


def _ours_over_peer(row: Row) -> Iterator[tuple[str, Summary]]:
    r = row.ratio
    if row.instructions is not None:  # the peer is an earlier build
        yield "instructions", Summary(row.instructions, row.instructions, row.instructions, 1)
    if r is None or row.who == row.baseline:
        return
    if row.baseline == OURS:
        yield row.who, Summary(1 / r.median, 1 / r.q3, 1 / r.q1, r.count)
    elif row.who == OURS:
        yield row.baseline, r


def report(comparison: Comparison, least: float) -> str:
    """Format a comparison as lines of text."""
    slower = comparison.slower(least)
    lines = []
    for key, changes in slower.items():
        factor = statistics.median(change.factor for change in changes)
        lines.append(f"SLOWER {factor:.2f} times: {_name(key)}")
        lines += [
            f"    over {c.peer}: {c.old.shown(3)} -> {c.new.shown(3)}"
            + ("" if c.slower(least) else "  (within the spread)")
            for c in changes
        ]
    lines += [f"only in the old run: {_name(key)}" for key in comparison.only_old]
    lines += [f"only in the new run: {_name(key)}" for key in comparison.only_new]
    agree, total = comparison.agreement()
    share = f", {agree / total:.0%}" if total else ""
    lines.append(f"{agree} of {total} ratios agree within their combined spread{share}")
    lines.append(f"{len(slower)} of {len(comparison.changes)} cases became slower")
    return "\n".join(lines)


def _name(key: Key) -> str:
    return ", ".join(part for part in key if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files and print the result."""
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", help="the record to hold against, such as a committed one")
    parser.add_argument("new", help="the record of the new run")
    parser.add_argument("--least", type=float, default=1.1, help="smallest factor that counts")
    arguments = parser.parse_args(argv)
    if arguments.least < 1:
        parser.error(f"--least must be at least 1; got {arguments.least}")
    try:
        records = [read_record(path) for path in (arguments.old, arguments.new)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path, record in zip((arguments.old, arguments.new), records, strict=True):
        print(f"{path}: {record.environment.get('commit')} on {record.environment.get('cpu')}")
        for reason in record.noisy:
            print(f"    noisy: {reason}")
    comparison = compare_records(*records)
    if not comparison.changes:
        parser.error("the two runs have no case and peer in common")
    print(report(comparison, arguments.least))
    return int(bool(comparison.slower(arguments.least)))


if __name__ == "__main__":
    sys.exit(main())
