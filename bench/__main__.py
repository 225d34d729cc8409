"""Measure moe_fast beside its alternatives: ``python -m bench``, or ``moe-fast bench``.

Every operation runs on random data. Its candidates run in turn, and their outputs are checked
before anything is timed. All of this is repeated in several fresh processes, one after the other.
The result is one JSON file, which is complete after every case. ``python -m bench.report`` makes a
page from such files, ``python -m bench.compare`` compares two of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_fast import available_backends
from moe_fast.ops import native

from . import peak_memory
from .cases import SIZES, show
from .embedding import DATA
from .harness import ROOT
from .machine import measure_machine
from .passes import Pass, in_fresh_process, rows_of
from .record import Recorder

TIMED = (
    "route", "plan", "rows", "expert_mlp", "privacy_filter", "moe_mlp", "info_nce", "training_step",
    "growth",
)  # fmt: skip
JOBS = ("experts", "maxsim", "embedding", "natural_step", "cached_step", "import_time")
"""Measured only where they are asked for: they take long, and most need what training needs."""
OPERATIONS = (*TIMED, "peak_memory", *JOBS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and write them to a file."""
    arguments = parse(argv)
    if arguments.data:
        os.environ[DATA] = str(arguments.data.resolve(strict=True))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    machine = measure_machine(*((1, 64, 1) if arguments.size == "tiny" else ()))
    multiplies = native.cpu_capability or "torch"
    print(f"{torch.get_num_threads()} threads; {machine}; moe_fast multiplies with {multiplies}",
          end="\n\n", flush=True)  # fmt: skip
    recorder = Recorder(
        machine,
        size=arguments.size,
        processes=arguments.processes,
        backends={op: available_backends(op) for op in ("route", "plan", "expert_mlp", "info_nce")},
        products=native.cpu_capability,
    )
    timed = tuple(name for name in arguments.operations if name != "peak_memory")
    one = Pass(timed, arguments.size, arguments.seconds, torch.get_num_threads(), machine)
    run = rows_of if arguments.processes == 1 else in_fresh_process
    for number in range(1, arguments.processes + 1):
        for rows, share in run(one):
            so_far = recorder.add(rows, share)
            recorder.write(arguments.json)
            if number == arguments.processes:
                print(show(so_far), end="\n\n", flush=True)
            else:
                name = ", ".join(filter(None, rows[0].case))
                print(f"process {number} of {arguments.processes}: {name}", flush=True)
    if "peak_memory" in arguments.operations:
        for row in recorder.add(peak_memory.rows(arguments.size)):
            value = row.reason if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB"
            print(f"{', '.join(row.case[:2])}, {row.who}: {value}")
        recorder.write(arguments.json)
    for reason in recorder.record.noisy:
        print(f"NOISY MACHINE: {reason}. Its figures deserve doubt.")
    print(f"{arguments.json}: {len(recorder.record.rows)} rows, {time.monotonic() - start:.0f} s")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the settings of a run."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    allowed = ", ".join(OPERATIONS)
    parser.add_argument("operations", nargs="*", help=f"of {allowed} (default: before {JOBS[0]})")
    parser.add_argument("--size", choices=SIZES, default="default", help="how much to measure")
    parser.add_argument("--processes", type=int, default=3, help="fresh ones; 1 is this one")
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="for each case in each process, if it can"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: what torch takes")
    parser.add_argument("--data", type=Path, help="JSON lines a, b: texts of the whole jobs")
    default = ROOT / "bench" / "results" / "local" / "bench.json"
    parser.add_argument("--json", type=Path, default=default, help="file to write the record to")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.operations) - set(OPERATIONS))
    if unknown:
        parser.error(f"operations must be of {allowed}; got {', '.join(unknown)}")
    for name in ("threads", "processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}")
    arguments.operations = arguments.operations or [*TIMED, "peak_memory"]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
