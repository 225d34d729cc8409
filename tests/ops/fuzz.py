"""Random problems, and random nonsense, for the native ops: right or refused, never a crash.

Problems have any shape, dtype, mode and thread count, and are compared with the reference in
float64. Nonsense is a problem with a few of its arguments damaged: values of index tensors, shapes,
dtypes, layouts, numbers, names. The op may refuse it with RuntimeError, or find that it still makes
sense.
"""

from __future__ import annotations

import argparse
import itertools
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .fuzz_problems import SUBJECTS, Arguments, Subject
from .helpers import num_threads, relative_error

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check_right(subject: Subject, arguments: Arguments) -> None:
    """Raise AssertionError unless the native op agrees with the reference in float64."""
    exact = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    actual, expected = subject.run(arguments, True), subject.run(exact, False)
    inputs = {v.dtype for v in arguments.values() if isinstance(v, Tensor)}
    tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in inputs)
    for position, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        error = _error(ours, theirs)
        if error > tolerance:  # fine if sums cancel so much that the reference errs, too
            error -= 4 * _error(subject.run(arguments, False)[position], theirs)
        assert error <= tolerance, f"output {position}: error {error:.1e}"


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry, or to 1 if that is less, as it is where sums cancel."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    if not largest:
        return actual.abs().sum().item()
    return relative_error(actual, expected) * min(largest, 1.0)


def damage(arguments: Arguments, rng: random.Random) -> None:
    """Change one argument, in a way that may or may not matter."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if value is None:
        return
    if isinstance(value, str):
        arguments[name] = rng.choice(["", "gelu", "dense", "one", "no such name"])
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        arguments[name] = rng.choice([-(2**63), -1, 0, 1, 3, 1025, 10**6, 2**63 - 1])
        return
    if not isinstance(value, Tensor):
        arguments[name] = not value
        return
    if value.dtype == torch.int64 and value.numel() and rng.random() < 0.8:
        wrong = [-(2**63), -2, -1, 0, 1, value.numel(), 2**31, 2**62, rng.randint(-3, 800)]
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] = rng.choice(wrong)
        arguments[name] = value
        return
    ways = {
        "shorter": lambda: value[:-1],
        "longer": lambda: torch.cat([value, value[:1]]),
        "flat": lambda: value.flatten(),
        "strided": lambda: torch.stack([value] * 2, -1)[..., 0],
        "dtype": lambda: value.to(rng.choice([torch.float64, torch.int32, torch.bfloat16])),
        "none": lambda: None,
        "empty": lambda: value[..., :0],
    }
    arguments[name] = ways[rng.choice(list(ways))]()


def check_survives(subject: Subject, arguments: Arguments, rng: random.Random) -> bool:
    """Damage the arguments and call the op; whether they were refused."""
    for _ in range(rng.randint(1, 3)):
        damage(arguments, rng)
    try:
        subject.run(arguments, True)
    except (RuntimeError, TypeError, AttributeError):  # the last two: None for a tensor
        return True
    return False


def fuzz(seed: int, cases: Iterable[int]) -> Counter[str]:
    """Run the cases of a seed; counts of what was tried. Raises at the first failure, by name."""
    counts: Counter[str] = Counter()
    for case in cases:
        rng = random.Random(f"{seed}-{case}")
        torch.manual_seed(rng.getrandbits(32))
        name = rng.choice(list(SUBJECTS))
        counts[name] += 1
        try:
            arguments = SUBJECTS[name].draw(rng)
            with num_threads(rng.choice([1, 2, 3])):
                if rng.random() < 0.5:
                    counts["problems"] += 1
                    check_right(SUBJECTS[name], arguments)
                else:
                    counts["nonsense"] += 1
                    counts["refused"] += check_survives(SUBJECTS[name], arguments, rng)
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}, {name}: {error}") from error
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, and print the seed first: it repeats the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args(argv)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    end = time.monotonic() + arguments.seconds
    until = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
    print(dict(fuzz(seed, until)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
