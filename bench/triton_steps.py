"""What each step of the kernels' redesign changed in their machine code, as a table of the docs.

    python -m bench.triton_steps

``docs/kernels-steps.json`` holds the figures of each step, compiled for sm_90 by the Triton that it
names. Of kernels that are still launched, the last figures are also in
``docs/kernels-resources.json``, which a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = Path(__file__).parents[1] / "docs" / "kernels-steps.json"
# A multiprocessor of sm_90: registers, given to warps in units of 256; bytes of shared memory, of
# which each program takes 1,024 more than it asks for; warps.
_REGISTERS, _UNIT, _SHARED_MEMORY, _RESERVED, _WARPS = 65_536, 256, 233_472, 1_024, 64
_HEAD = (
    "step", "kernel", "tile", "registers", "spilled bytes", "in the main loop", "buffers",
    "instructions", "epilogue", "programs",
)  # fmt: skip


def programs(registers: int, shared_memory: int, warps: int) -> int:
    """Return how many programs fit a multiprocessor of sm_90 at a time."""
    per_warp = -(-registers * 32 // _UNIT) * _UNIT
    return min(
        _REGISTERS // (per_warp * warps),
        _SHARED_MEMORY // (shared_memory + _RESERVED),
        _WARPS // warps,
    )


def table(path: Path = STEPS) -> str:
    """Return the table in Markdown."""
    rows = [_HEAD, tuple("---" for _ in _HEAD)]
    rows += [_row(entry) for entry in json.loads(path.read_text())["kernels"]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    numbers = ("registers", "spills", "loop_spills", "buffers", "instructions", "epilogue")
    fit = programs(entry["registers"], entry["shared_memory"], entry["warps"])
    shown = (f"{entry[name]:,}" for name in numbers)
    return entry["step"], entry["kernel"], entry["tile"], *shown, str(fit)


if __name__ == "__main__":
    print(table(), end="")
