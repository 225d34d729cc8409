"""What ``bench.gpu`` runs in processes of their own: sanitizer, profiler, the CUDA kernels' tests.

    python -m bench.gpu_tools tiny            ten tiny cases, for compute-sanitizer
    python -m bench.gpu_tools product up      one product at full size, for ncu

A tool that is not installed leaves out its part, and the record says so.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .gpu_record import GIVEN_UP, LEFT_OUT
from .harness import ROOT

# Kernels that ncu looks at, by the product that launches each.
PROFILED = {
    "up": "up_kernel",
    "down": "linear_kernel",
    "grad_hidden": "grad_hidden_kernel",
    "grad_x": "linear_kernel",
    "grad_down": "grad_weight_kernel",
    "grad_up": "grad_weight_kernel",
}
SANITIZERS = ("memcheck", "racecheck")
_FOUND = 99  # compute-sanitizer's exit code if it found something
_TINY = dict(
    tokens=(1, 37, 130),
    experts=(1, 3),
    k=(1, 2),
    dim=(24, 64, 131),
    dtype=(torch.bfloat16, torch.float32),
    gated=(False, True),
    bias=(True, False),
    load=("any", "empty", "skip"),
    recompute=(None,),
)


# --- the cases -----------------------------------------------------------------------------------


def items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ten tiny cases: six of the experts, two of the router, two of the contrastive loss."""
    from . import gpu_checks, gpu_info_nce
    from .problem import covering

    for settings in covering(_TINY)[:6]:
        yield f"experts {settings}", partial(gpu_checks.launch_experts, settings, device)
    for mode, weight_mode in (("token_topk", "renormalize"), ("dense", "probability")):
        k = "E" if mode == "dense" else 2
        settings = dict(tokens=37, experts=3, k=k, dim=24, dtype=torch.bfloat16)
        settings |= dict(mode=mode, weight_mode=weight_mode)
        yield f"route {settings}", partial(gpu_checks.launch_route, settings, device)
    for masks in (False, True):
        settings = dict(batch=63, dim=24, per_row=int(masks), dtype=torch.bfloat16)
        settings |= dict(symmetric=True, similarity="cosine", texts=masks, groups=masks)
        settings |= dict(label_smoothing=0.1 * masks)
        yield f"info_nce {settings}", partial(gpu_info_nce.launch, settings, device)


def main(argv: Sequence[str]) -> int:
    """Run the tiny cases or one product; return 2 without a GPU."""
    if not torch.cuda.is_available():
        print("bench.gpu_tools: error: no GPU is there.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if argv[0] == "tiny":
        for name, run in items(device):
            print(name, flush=True)
            run()
            torch.cuda.synchronize()
        return 0
    from .gpu_kernels import pieces
    from .gpu_times import BASE

    piece = next(p for p in pieces(BASE, device) if p.name == f"{argv[1]}, triton")
    for _ in range(3):
        piece.run()
    torch.cuda.synchronize()
    return 0


# --- the tools -----------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """Return the path of one of CUDA's tools, from PATH or the toolkit's folder."""
    folders = [os.environ.get("PATH", os.defpath)]
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        folders += [f"{home}/bin", f"{home}/compute-sanitizer"] if home else []
    return shutil.which(name, path=os.pathsep.join(folders))


def _run(
    command: Sequence[str], seconds: float, log: Path, **environment: str
) -> subprocess.CompletedProcess | None:
    """Run in the repository's root, with the output in a file too; None if it took too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(1.0, seconds),
        )
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        log.write_bytes(output if isinstance(output, bytes) else output.encode())
        return None
    log.write_text(done.stdout, encoding="utf-8")
    return done


def sanitize(name: str, seconds: float, out: Path) -> dict[str, Any]:
    """Run the tiny cases under one of :data:`SANITIZERS`; return what it found."""
    program = tool("compute-sanitizer")
    if program is None:
        return {LEFT_OUT: "compute-sanitizer is not installed"}
    command = [program, "--tool", name, "--error-exitcode", str(_FOUND)]
    command += [sys.executable, "-m", "bench.gpu_tools", "tiny"]
    log = out / f"{name}.log"
    done = _run(command, seconds, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if done is None:
        return {LEFT_OUT: f"not done in {seconds:.0f} s", "log": log.name}
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    found: dict[str, Any] = {"exit": done.returncode, "summary": summary, "log": log.name}
    if done.returncode:
        found["failures"] = done.stdout.splitlines()[-20:]
    return found


def profile(product: str, seconds: float, out: Path) -> dict[str, Any]:
    """Return ncu's metrics of the kernel of one product at full size."""
    program = tool("ncu")
    if program is None:
        return {LEFT_OUT: "ncu is not installed"}
    command = [program, "--set", "detailed", "--csv", "--page", "details"]
    command += ["--kernel-name", f"regex:^{PROFILED[product]}", "--launch-skip", "1"]
    command += ["--launch-count", "1", sys.executable, "-m", "bench.gpu_tools", "product", product]
    log = out / f"ncu-{product}.log"
    done = _run(command, seconds, log)
    if done is None:
        return {LEFT_OUT: f"not done in {seconds:.0f} s", "log": log.name}
    metrics = ncu_metrics(done.stdout)
    if done.returncode or not metrics:
        return {GIVEN_UP: f"exit code {done.returncode}: {done.stdout[-2000:]}"}
    return {"metrics": metrics, "log": log.name}


def ncu_metrics(output: str) -> dict[str, str]:
    """Return the metrics in ncu's CSV, with their units; what programs print is skipped."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(lines[first:])
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row.get("Metric Name")
    }


def cuda_tests(seconds: float, out: Path) -> dict[str, Any]:
    """Build the native library's CUDA half where it is missing, and run its tests on this GPU."""
    found: dict[str, Any] = {"built": "found"}
    if not (ROOT / "moe_fast" / "_native_cuda.so").exists():
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = _run(command, seconds, out / "build.log", MOE_FAST_NATIVE="1")
        if done is None or done.returncode:
            tail = "too slow" if done is None else done.stdout[-1000:]
            return {LEFT_OUT: f"the native library cannot be built here: {tail}"}
        found["built"] = "here"
    if find_spec("pytest") is None:
        return found | {LEFT_OUT: "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--noconftest"]
    done = _run([*command, "tests/ops/test_cuda.py"], seconds, out / "test_cuda.log")
    if done is None:
        return found | {LEFT_OUT: f"not done in {seconds:.0f} s"}
    return found | pytest_result(done.returncode, done.stdout)


def pytest_result(code: int, output: str) -> dict[str, Any]:
    """Return pytest's last line; tests that fail are failures, and no test at all is left out."""
    lines = output.strip().splitlines()
    summary = lines[-1] if lines else ""
    if code or not re.search(r"\d+ passed", summary):
        if "skipped" in summary and "failed" not in summary:
            return {LEFT_OUT: next((x for x in lines if x.startswith("SKIPPED")), summary)}
        return {"summary": summary, "failures": lines[-30:] or [f"no output, exit code {code}"]}
    return {"summary": summary}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
