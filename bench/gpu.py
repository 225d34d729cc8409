"""Everything about the Triton kernels that needs a GPU, in one run of at most nine minutes.

    python -m bench.gpu              checks, tunes, times; writes bench/results/<gpu>-<date>.json
    python -m bench.gpu --dry-run    the same on the CPU, interpreted, at tiny shapes

1. ``correct``: errors against float64 on a grid of shapes, as far as its time goes; no
   synchronisation, CUDA-graph capture, bitwise repeats, offsets beyond 2^31, bytes saved.
   The contrastive loss too: errors, repeats, no synchronisation.
2. ``tune``: tile sizes for the shapes that are timed; the table is written beside the record.
3. ``time``: against per-expert cuBLAS, a compiled dense MLP and transformers' experts, and
   against the floor that this GPU's own ceilings set; the contrastive loss at B = 65,536, its
   time and its memory against the targets.

The record is written after every part: what was measured is kept, whatever happens later.
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
    """Run every part; exit code 1 if one fails."""
    arguments = _parser().parse_args(argv)
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, below
    elif not torch.cuda.is_available():
        print("bench.gpu: error: no GPU is there; --dry-run needs none.", file=sys.stderr)
        return 2
    name = "dry-run" if arguments.dry_run else torch.cuda.get_device_name().replace(" ", "_")
    path = Path(arguments.json or _default_path(name))
    os.environ.setdefault("MOE_FAST_TUNING", str(path.parent / f"{path.stem}-tuning"))
    record: dict[str, Any] = {"environment": environment(), "parts": {}}
    failed = []
    for part, run in _parts(arguments).items():
        start = time.monotonic()
        try:
            record["parts"][part] = run()
        except Exception as error:  # what was measured before is worth keeping
            record["parts"][part] = {GIVEN_UP: "".join(traceback.format_exception(error))}
            print(record["parts"][part][GIVEN_UP], file=sys.stderr)
        if _has_failed(record["parts"][part]):
            failed.append(part)
        record["parts"][part]["seconds"] = time.monotonic() - start
        print(f"== {part}: {record['parts'][part]['seconds']:.0f} s", flush=True)
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


def _default_path(name: str) -> Path:
    return ROOT / "bench" / "results" / f"{name}-{time.strftime('%Y-%m-%d')}.json"


def _parts(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "correct": lambda: correct(arguments),
        "tune": lambda: tune(arguments),
        "time": lambda: times(arguments),
    }
    return {n: run for n, run in parts.items() if arguments.only in (None, n)}


def _has_failed(result: Any) -> bool:
    if not isinstance(result, dict):
        return False
    return (
        GIVEN_UP in result or bool(result.get("failures")) or any(map(_has_failed, result.values()))
    )


def _cases(dry: bool) -> dict[str, Any]:
    """BERT-base, 64k tokens, K = 1 and 2; other widths; other loads."""
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
    """Errors on the grids, then the properties."""
    from . import gpu_checks as checks
    from . import gpu_info_nce as contrastive

    dry, device = arguments.dry_run, _device(arguments.dry_run)
    experts = checks.covering(checks.DRY_GRID if dry else checks.GRID)
    routes = checks.routes(checks.DRY_ROUTES if dry else checks.ROUTES)
    base = _cases(dry)["K=1"]
    small = replace(base, tokens=min(base.tokens, 4099))
    result: dict[str, Any] = {
        "experts": checks.check_grid(
            experts, checks.check_experts, device, 0.55 * arguments.check_seconds
        ),
        "route": checks.check_grid(
            routes, checks.check_route, device, 0.2 * arguments.check_seconds
        ),
        "output block": checks.check_grid(
            [{"k": k, "dtype": dtype} for k in (1, 2) for dtype in checks.BOUNDS],
            lambda settings, on: checks.check_output_block(replace(small, **settings), on),
            device,
            0.1 * arguments.check_seconds,
        ),
        "info_nce": checks.check_grid(
            checks.covering(contrastive.DRY_GRID if dry else contrastive.GRID),
            contrastive.check,
            device,
            0.15 * arguments.check_seconds,
        ),
        "info_nce repeats": attempt(lambda: contrastive.check_repeats(device, dry)),
        "saved bytes": checks.saved_bytes(base, device),
        "repeats": attempt(lambda: checks.check_repeats(base, device)),
    }
    if dry:
        result["left out"] = "synchronisation, CUDA graphs and far offsets need a GPU"
    else:
        result["synchronisation"] = attempt(lambda: checks.check_no_sync(base, device))
        result["graph"] = attempt(lambda: checks.check_graph(base, device))
        far = replace(base, tokens=720_000)
        result["far offsets"] = attempt(lambda: checks.check_far_offsets(far, device))
    for key, value in result.items():
        print(f"{key}: {value}")
    return result


def attempt(run: Callable[[], Any]) -> Any:
    """What ``run`` returns, or the error it raises: the checks behind it still run."""
    try:
        return run()
    except Exception as error:
        return {GIVEN_UP: "".join(traceback.format_exception(error))}


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Search tile sizes for every case that is timed; write the GPU's table."""
    from moe_fast.triton_ops import launch_config, tuning_tables
    from moe_fast.triton_ops import tune as search

    device, cases = _device(arguments.dry_run), _cases(arguments.dry_run)
    record: dict[str, Any] = {}
    for name, case in cases.items():
        share = 0.6 if name == "K=1" else 0.4 / (len(cases) - 1)  # what is quoted first
        sizes = {n: getattr(case, n) for n in ("tokens", "experts", "k", "dim", "hidden", "dtype")}
        found = search.search(
            search.Problem(**sizes), device, seconds=share * arguments.tune_seconds
        )
        tuning_tables.add_to_table(
            launch_config.gpu_name(device), {k: c.after for k, c in found.items()}
        )
        record[name] = found
        for choice in found.values():
            print(f"{name} {choice.product}: {choice.before_ms:.3f} -> {choice.after_ms:.3f} ms, "
                  f"{choice.tried} tried: {choice.after}")  # fmt: skip
    return record


def times(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every comparison, and the share of the floor."""
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
        torch.cuda.empty_cache()  # of the graphs' memory
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
            direction: attempt(partial(_of_floor, case, backward, settings, ceilings))
            for direction, backward in (("forward", False), ("forward + backward", True))
        }
        for case in [*cases.values(), *scaled]
    }
    for name, found in record["floor"].items():
        print(name, found)
    record["info_nce"] = attempt(lambda: _info_nce(settings, ceilings))
    print("info_nce", record["info_nce"])
    return record


def _info_nce(settings: Any, ceilings: Any) -> dict[str, Any]:
    from . import gpu_info_nce as contrastive

    return contrastive.times(settings, ceilings)


def _of_floor(case: Any, backward: bool, settings: Any, ceilings: Any) -> dict[str, float]:
    from . import gpu_times as t

    seconds, least = t.alone(case, backward, settings), t.floor(case, ceilings, backward)
    return {"seconds": seconds, "floor": least, "share": least / seconds}


if __name__ == "__main__":
    sys.exit(main())
