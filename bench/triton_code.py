"""Reads NVIDIA's machine code of a compiled kernel: where its loops are, and what is in them.

The main loop is the innermost loop that multiplies on tensor cores. What follows it is the
epilogue. A spill outside of it costs a few cycles per tile; one inside costs them at every step.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# HMMA: mma.sync; HGMMA: wgmma; UTC?MMA: tcgen05
_PRODUCT = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTC\w*MMA)\b")
_SPILL = re.compile(r"\b(LDL|STL)\b")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))")


@dataclasses.dataclass(frozen=True)
class Code:
    """Numbers of instructions of a kernel.

    Attributes:
        instructions: all of them, without the padding at the end.
        loop: those of the main loop (of the shortest, if there are several); 0 without one.
        tail: those behind the last main loop, which are the epilogue.
        loop_spills: those of all main loops that read or write spilled registers.
        spills: all that do.
    """

    instructions: int
    loop: int
    tail: int
    loop_spills: int
    spills: int


def tool(name: str, cubin: bytes, *arguments: str) -> str:
    """Return what a program of Triton's package, such as cuobjdump, prints about a kernel."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read_code(cubin: bytes) -> Code:
    """Disassemble a kernel and count its instructions."""
    return count(tool("cuobjdump", cubin, "-sass"))


def count(sass: str) -> Code:
    """Count the instructions of a listing."""
    lines = [(int(at, 16), text) for at, text in _LINE.findall(sass)]
    while lines and (lines[-1][1] == "NOP" or _branch(lines[-1][1]) == lines[-1][0]):
        lines.pop()
    loops = main_loops(lines)
    inside = [t for at, t in lines if any(first <= at <= last for first, last in loops)]
    last = max((last for _, last in loops), default=lines[-1][0])
    sizes = [sum(first <= at <= end for at, _ in lines) for first, end in loops]
    return Code(
        instructions=len(lines),
        loop=min(sizes, default=0),
        tail=sum(at > last for at, _ in lines),
        loop_spills=sum(bool(_SPILL.search(t)) for t in inside),
        spills=sum(bool(_SPILL.search(t)) for _, t in lines),
    )


def _branch(text: str) -> int | None:
    found = _BRANCH.search(text)
    return int(found[1], 16) if found and found[1] else None


def main_loops(lines: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Return the (first, last) addresses of the innermost loops with products, in order.

    A wait for a barrier is tried again from a place behind the kernel's end. Its branch back looks
    like a loop around much more; therefore the shorter of two that overlap is the loop.
    """
    loops = []
    for at, text in lines:
        start = _branch(text)
        if start is not None and start < at:
            loops.append((start, at))
    products = [at for at, text in lines if _PRODUCT.search(text)]
    loops = [loop for loop in loops if any(loop[0] <= at <= loop[1] for at in products)]
    found: list[tuple[int, int]] = []
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        if all(last < start or end < first for start, end in found):
            found.append((first, last))
    return sorted(found)


_BUFFERS = re.compile(
    r"ttg\.local_alloc\s*(?:\{[^}]*\}\s*)?:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x(\d+)x(\d+)x"
)


def buffers(asm: dict[str, Any]) -> int:
    """Return how many operand tiles the pipeline of a kernel holds at a time; 0 without one.

    This is the least of its operands' buffers. Operands whose addresses are loaded themselves get
    fewer than ``num_stages``.
    """
    found = [int(n) for n, *_ in _BUFFERS.findall(asm["ttgir"])]
    return min((n for n in found if n > 1), default=0)
