"""Join the records of rehearsed calls of ``bench.gpu`` into one file, and write the docs' table.

    python -m bench.gpu precompile kernels ... --rehearse --out build/rehearsal/1   (and 2, and 3)
    python -m bench.gpu_rehearsal build/rehearsal/1 build/rehearsal/2 build/rehearsal/3

The file is ``docs/kernels-rehearsal.json``. Where it will run, a call compiles in 16 processes; the
estimate for these is the processor seconds over 16. Of a call that compiled a sample (``--every``),
the seconds are scaled to all of its kernels. Collecting comes before, in one process; its seconds
are those of the clock, and long where the machine had other work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .gpu_compile import COMPILED
from .harness import ROOT, write_json

FILE = ROOT / "docs" / "kernels-rehearsal.json"
PAGE = ROOT / "docs" / "kernels.md"
PROCESSES = 16
_BEGIN, _END = "<!-- rehearsal -->", "<!-- end of rehearsal -->"


def call_of(folder: Path) -> dict[str, Any]:
    """Return what one rehearsed call did: its parts, kernels, seconds, and bytes of the record."""
    text = (folder / "record.json").read_text(encoding="utf-8")
    record = json.loads(text)
    compiled = json.loads((folder / COMPILED).read_text(encoding="utf-8"))
    kernels = list(compiled["kernels"].values())
    seconds = compiled["processor_seconds"]
    all_seconds = seconds * compiled["kernels_in_all"] / max(1, len(kernels))
    collecting = compiled["seconds_collecting"]
    return {
        "call": folder.name,
        "commit": record["environment"]["commit"],
        "parts": {
            part: "left out: " + next(iter(found.values()))["left out"]
            if any("left out" in value for value in found.values())
            else next(iter(found.values()))["summary"]
            for part, found in record["parts"].items()
        },
        "kernels": len(kernels),
        "kernels_collected": compiled["kernels_in_all"],
        "failed": sum("error" in k for k in kernels) + len(compiled["failures"]),
        "processes": compiled["processes"],
        "wall_seconds": compiled["seconds"],
        "collecting_seconds": collecting,
        "processor_seconds": seconds,
        "estimated_processor_seconds_of_all": all_seconds,
        "estimated_seconds_in_16_processes": all_seconds / PROCESSES,
        "record_bytes": len(text.encode()),
        "compiled_bytes": (folder / COMPILED).stat().st_size,
        "slowest": sorted(
            ({"kernel": k["name"], "processor_seconds": k["processor_seconds"]}
             for k in kernels if "processor_seconds" in k),
            key=lambda k: -k["processor_seconds"],
        )[:5],
    }  # fmt: skip


def table(rehearsal: Mapping[str, Any]) -> str:
    """Return the docs' table of a rehearsal."""
    lines = [
        "| call | kernels compiled | failed | processor seconds | of all kernels, estimated | "
        "in 16 processes, estimated | bytes of the records |",
        "|---|---|---|---|---|---|---|",
    ]
    for call in rehearsal["calls"]:
        size = call["record_bytes"] + call["compiled_bytes"]
        lines.append(
            f"| {call['call']} | {call['kernels']} of {call['kernels_collected']} | "
            f"{call['failed']} | "
            f"{call['processor_seconds']:.0f} s | "
            f"{call['estimated_processor_seconds_of_all']:.0f} s | "
            f"{call['estimated_seconds_in_16_processes']:.0f} s | {size:,} |"
        )
    return "\n".join(lines)


def in_page(page: str, rehearsal: Mapping[str, Any]) -> str:
    """Return the page with the rehearsal's table in its place."""
    before, _, rest = page.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise ValueError(f"the page has no {_BEGIN} ... {_END}.")
    return f"{before}{_BEGIN}\n{table(rehearsal)}\n{_END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file, and the table in the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the calls' folders")
    folders = parser.parse_args(argv).folders
    first = json.loads((folders[0] / "record.json").read_text(encoding="utf-8"))
    names = ("python", "versions", "platform", "cpu", "cpus")
    rehearsal = {
        "environment": {name: first["environment"][name] for name in names},
        "calls": [call_of(folder) for folder in folders],
    }
    write_json(FILE, rehearsal)
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8"), rehearsal), encoding="utf-8")
    print(table(rehearsal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
