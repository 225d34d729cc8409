"""Everything about the Triton kernels that needs a GPU, in one run of at most nine minutes.

    python -m bench.gpu              checks, tunes, times; writes bench/results/<gpu>-<date>.json
    python -m bench.gpu --dry-run    the same on the CPU, interpreted, at tiny shapes

1. ``correct`` checks errors against float64 on a grid of shapes, until its time is over. It checks
   that nothing synchronises, that CUDA graphs capture, that repeats agree bitwise and that offsets
   beyond 2^31 work; it counts the bytes saved for the backward pass. For the contrastive loss it
   checks errors, repeats and synchronisation.
2. ``tune`` searches tile sizes for the shapes that are timed; the table is written beside the
   record.
3. ``time`` compares with per-expert cuBLAS, a compiled dense MLP and transformers' experts, and
   with the floor that this GPU's own ceilings give. It measures time and memory of the contrastive
   loss at B = 65,536 against their targets.

The record is written after every part, so results are kept if a later part fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .harness import ROOT, environment, write_json

GIVEN_UP = "error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run every part; return 1 if one fails, 2 without a GPU."""
    arguments = _parser().parse_args(argv)
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, below
    elif not torch.cuda.is_available():
        print("bench.gpu: error: no GPU is there; --dry-run needs none.", file=sys.stderr)
        return 2
    name = "dry-run" if arguments.dry_run else torch.cuda.get_device_name().replace(" ", "_")
    default = ROOT / "bench" / "results" / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    path = Path(arguments.json or default)
    os.environ.setdefault("MOE_FAST_TUNING", str(path.parent / f"{path.stem}-tuning"))
    record: dict[str, Any] = {"environment": environment(), "parts": {}}
    failed = []
    for part, run in _parts(arguments).items():
        start = time.monotonic()
        found = record["parts"][part] = attempt(run)
        print(found.get(GIVEN_UP, ""), file=sys.stderr, end="")
        if _has_failed(found):
            failed.append(part)
        found["seconds"] = time.monotonic() - start
        print(f"== {part}: {found['seconds']:.0f} s", flush=True)
        write_json(path, record)
    print(f"{path}: {', '.join(failed) + ' FAILED' if failed else 'all parts passed'}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--only", choices=("correct", "tune", "time"), help="one part alone")
    parser.add_argument("--check-seconds", type=float, default=120.0)
    parser.add_argument("--tune-seconds", type=float, default=210.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="write the record to this file")
    return parser


def _parts(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    parts = {"correct": correct, "tune": tune, "time": times}
    wanted = [arguments.only] if arguments.only else parts
    return {name: partial(parts[name], arguments) for name in wanted}


def _has_failed(result: Any) -> bool:
    if not isinstance(result, dict):
        return False
    return (
        GIVEN_UP in result or bool(result.get("failures")) or any(map(_has_failed, result.values()))
    )


def _cases(dry: bool) -> dict[str, Any]:
    """Return the shapes: BERT-base with 64k tokens, K = 1 and 2; two other widths."""
    from .problem import Shape

    if dry:
        base = Shape(24, experts=3, k=1, dim=16, hidden=32, dtype=torch.float32)
        return {"K=1": base, "K=2": replace(base, k=2)}
    base = Shape(65_536, experts=8, k=1, dim=768, hidden=3072, dtype=torch.bfloat16)
    return {
        "K=1": base,
        "K=2": replace(base, k=2),
        "D=384": replace(base, dim=384, hidden=1536),
        "D=1024": replace(base, dim=1024, hidden=4096),
    }


def _device(dry: bool) -> torch.device:
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())


def correct(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the errors on the grids, then the properties."""
    from . import gpu_checks as checks
    from . import gpu_info_nce as contrastive
    from .problem import BOUNDS, covering

    dry, device = arguments.dry_run, _device(arguments.dry_run)
    base = _cases(dry)["K=1"]
    small, far = replace(base, tokens=min(base.tokens, 4099)), replace(base, tokens=720_000)

    def on_grid(cases: list[dict[str, Any]], check: Callable, share: float) -> dict[str, Any]:
        return checks.check_grid(cases, check, device, share * arguments.check_seconds)

    def check_block(settings: dict[str, Any], device: torch.device) -> dict[str, float]:
        return checks.check_output_block(replace(small, **settings), device)

    experts, routes = (checks.DRY_GRID, checks.DRY_ROUTES) if dry else (checks.GRID, checks.ROUTES)
    pairs = contrastive.DRY_GRID if dry else contrastive.GRID
    result: dict[str, Any] = {
        "experts": on_grid(covering(experts), checks.check_experts, 0.55),
        "route": on_grid(checks.routes(routes), checks.check_route, 0.2),
        "output block": on_grid(covering({"k": (1, 2), "dtype": tuple(BOUNDS)}), check_block, 0.1),
        "info_nce": on_grid(covering(pairs), contrastive.check, 0.15),
    }
    result["info_nce repeats"] = attempt(lambda: contrastive.check_repeats(device, dry))
    result["saved bytes"] = checks.saved_bytes(base, device)
    result["repeats"] = attempt(lambda: checks.check_repeats(base, device))
    if dry:
        result["left out"] = "synchronisation, CUDA graphs and far offsets need a GPU"
    else:
        result["synchronisation"] = attempt(lambda: checks.check_no_sync(base, device))
        result["graph"] = attempt(lambda: checks.check_graph(base, device))
        result["far offsets"] = attempt(lambda: checks.check_far_offsets(far, device))
    for key, value in result.items():
        print(f"{key}: {value}")
    return result


def attempt(run: Callable[[], Any]) -> Any:
    """Return the result of ``run``, or the error it raises, so that later checks still run."""
    try:
        return run()
    except Exception as error:
        return {GIVEN_UP: "".join(traceback.format_exception(error))}


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Search tile sizes for every case that is timed; write the GPU's table."""
    from moe_fast.ops import tuning

    cases = _cases(arguments.dry_run)
    record: dict[str, Any] = {}
    for name, case in cases.items():
        share = 0.6 if name == "K=1" else 0.4 / (len(cases) - 1)  # the most important case
        record[name] = tuning.tune(
            *(case.dim, case.hidden, case.experts, case.k),
            tokens=case.tokens,
            dtype=case.dtype,
            seconds=share * arguments.tune_seconds,
            device=_device(arguments.dry_run),
        ).choices
        for choice in record[name].values():
            print(f"{name} {choice.product}: {choice.before_ms:.3f} -> {choice.after_ms:.3f} ms, "
                  f"{choice.tried} tried: {choice.after}")  # fmt: skip
    return record


def times(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every comparison, and the share of the floor."""
    from . import gpu_info_nce as contrastive
    from . import gpu_times as t
    from .cases import show

    dry, cases = arguments.dry_run, _cases(arguments.dry_run)
    settings = t.Settings(_device(dry), 1 if dry else arguments.rounds, dry)
    base = cases["K=1"]
    ceilings = t.ceilings(settings, base.dtype)
    record: dict[str, Any] = {"ceilings": ceilings}
    print(f"ceilings: {ceilings}")

    def compared(title: str, run: Callable[[], list]) -> None:
        record[title] = attempt(run)
        torch.cuda.empty_cache()  # frees the graphs' memory
        found = record[title]
        print(f"{title}: {found[GIVEN_UP] if GIVEN_UP in found else show(found)}", end="\n\n")

    for backward, direction in ((False, "forward"), (True, "forward + backward")):
        for case in (cases["K=1"], cases["K=2"]):
            compared(f"{direction}, {case}", partial(t.against_others, case, backward, settings))
        compared(
            f"{direction}, {base}, no biases",
            partial(t.against_transformers, base, backward, settings),
        )
    compared(
        f"12 layers, enforced, {base}", lambda: t.layers_enforced(base, settings, 2 if dry else 12)
    )
    tokens = (24, 48) if dry else (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
    scaled = [replace(base, tokens=n) for n in tokens]
    record["floor"] = {
        str(case): {
            direction: attempt(partial(t.of_floor, case, backward, settings, ceilings))
            for direction, backward in (("forward", False), ("forward + backward", True))
        }
        for case in [*cases.values(), *scaled]
    }
    for name, found in record["floor"].items():
        print(name, found)
    record["info_nce"] = attempt(lambda: contrastive.times(settings, ceilings))
    print("info_nce", record["info_nce"])
    return record


if __name__ == "__main__":
    sys.exit(main())
