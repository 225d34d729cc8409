"""Try every bad input, and kill commands at random moments: ``python -m tests.hostile``.

Ends with exit code 1 where fewer than 98 % of the bad inputs give a clear error, where one ends in
a signal or a time-out, where a control is refused, or where a kill leaves other bytes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.hostile.bases import make_bases
from tests.hostile.cases import CLEAR, OUTCOMES, SIGNALLED, TIMED_OUT, Result, all_cases
from tests.hostile.kills import run_kills
from tests.hostile.processes import run_cases

_SHARE = 0.98


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--sample", type=int, help="so many cases, drawn; by default all")
    parser.add_argument("--only", default="", help="cases with this in group or name")
    parser.add_argument("--kills", type=int, default=40, help="kills at random moments")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile") as temporary:
        folder = Path(temporary).resolve()
        make_bases(folder)
        chosen = [
            i for i, case in enumerate(all_cases()) if given.only in f"{case.group} {case.name}"
        ]
        if given.sample is not None:
            chosen = random.Random(given.seed).sample(chosen, min(given.sample, len(chosen)))
        results = []
        for result in run_cases(chosen, folder, given.processes) if chosen else ():
            results.append(result)
            if not result.is_right:
                print(f"{len(results)} of {len(chosen)}: {shown(result)}", file=sys.stderr)
        print(summary(results))
        kills = []
        for kill in run_kills(given.kills, folder, given.seed, given.processes):
            print(kill, flush=True)
            kills.append(kill)
    print(f"{time.monotonic() - start:.0f} s")
    return 0 if is_good(results) and all(kill.is_right for kill in kills) else 1


def summary(results: Sequence[Result]) -> str:
    """A table of the outcomes per group, and what did not end as it should."""
    lines = ["", "group".ljust(16) + "".join(outcome.rjust(16) for outcome in OUTCOMES)]
    groups = sorted({result.group for result in results})
    for group in [*groups, "all bad inputs"]:
        found = Counter(
            result.outcome
            for result in results
            if result.group == group or (group == "all bad inputs" and not result.control)
        )
        lines.append(group.ljust(16) + "".join(f"{found[o]:16,}" for o in OUTCOMES))
    bad = [result for result in results if not result.control]
    clear = sum(result.outcome == CLEAR for result in bad)
    if bad:
        lines.append(f"{clear} of {len(bad)} bad inputs ({clear / len(bad):.1%}): a clear error")
    if results:
        slowest = max(results, key=lambda result: result.seconds)
        lines.append(f"the slowest, after {slowest.seconds:.1f} s: {slowest.group}, {slowest.name}")
    wrong = sorted((r for r in results if not r.is_right), key=lambda r: (r.group, r.name))
    return "\n".join([*lines, *(f"  {shown(result)}" for result in wrong)])


def shown(result: Result) -> str:
    """A line about one case."""
    message = result.message.encode("unicode_escape").decode()[:300]
    return f"{result.outcome}: {result.group}, {result.name}  {message}"


def is_good(results: Sequence[Result]) -> bool:
    """Whether as many errors are clear as must be, and nothing is worse than unclear."""
    bad = [result for result in results if not result.control]
    worst = any(result.outcome in (SIGNALLED, TIMED_OUT) for result in results)
    controls = all(result.is_right for result in results if result.control)
    return not worst and controls and sum(r.is_right for r in bad) >= _SHARE * len(bad)


if __name__ == "__main__":
    sys.exit(main())
