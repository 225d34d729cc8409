"""Compile the kernels of a run of ``bench.gpu`` before it, in many processes; no GPU is needed.

    python -m bench.gpu_compile kernels step --json compiled.json --processes 16

1. The run's own calls are made on "meta" tensors, with a driver that only says which GPU is meant.
   Triton's launcher then asks a hook before it compiles; the hook takes the key and says no.
2. The processes make the collected launches again, by ``warmup``, which compiles as a launch does.
   The compiled code is therefore found in Triton's cache under the key that the launches of the run
   will look for; ``triton.compile`` alone would store it under another one.

The record has every kernel with its registers, spills, shared memory and seconds, and which kernels
each item of the run launches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from .harness import write_json

META = torch.device("meta")
H200 = "NVIDIA H200"
COMPILED = "compiled.json"  # the record's name in the output folder of bench.gpu
# One item of a run: its name, and a function that makes its calls.
Item = tuple[str, Callable[[], Any]]


class _NoGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass
class Launch:
    """A launch that needs a kernel of its own: the kernel, and with what it was launched."""

    kernel: Any  # triton.JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name with its settings, as launchers write them, and its dtypes."""
        shown = [f"{n}={v}" for n, v in self.kwargs.items() if v is not None]
        tensors = [getattr(a, "base", a) for a in self.args]  # of a descriptor
        dtypes = {str(t.dtype)[6:] for t in tensors if isinstance(t, torch.Tensor)}
        floats = sorted(d for d in dtypes if "float" in d)
        return " ".join([self.kernel.__name__, *shown, *floats])


@dataclasses.dataclass
class Collected:
    """What calls launched: launches by key, in order, and the keys of the launches of each item."""

    launches: dict[str, Launch] = dataclasses.field(default_factory=dict)
    items: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def instead_of_a_gpu(
    gpu: str = H200, capability: int = 90, multiprocessors: int = 132
) -> Iterator[None]:
    """Within the block, Triton compiles for a GPU that is not there; nothing can be launched."""
    from moe_fast.triton_ops import launch_config
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from moe_fast.ops import backends

    target, before = GPUTarget("cuda", capability, 32), driver._active
    driver.set_active(_NoGpu(target))
    available, autocast = backends.why_unavailable, torch.autocast
    is_enabled = torch.is_autocast_enabled

    # torch has no autocast for "meta", not even one that is off.
    def is_autocast_enabled(*device_type: str) -> bool:
        return device_type != ("meta",) and is_enabled(*device_type)

    def autocast_or_none(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type == "meta":
            return contextlib.nullcontext()
        return autocast(device_type, *args, **kwargs)

    def why_unavailable(op: str, backend: str, device_type: str, *index: int | None) -> str | None:
        if backend == "triton" and device_type == "meta":
            return None
        return available(op, backend, device_type, *index)

    try:
        with (
            mock.patch.object(launch_config, "target_of", lambda index: f"sm_{capability}"),
            mock.patch.object(launch_config, "gpu_name", lambda device: gpu),
            mock.patch.object(launch_config, "multiprocessors", lambda index: multiprocessors),
            mock.patch.object(backends, "why_unavailable", why_unavailable),
            mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
            mock.patch.object(torch, "autocast", autocast_or_none),
            backends.use_backend("triton"),
        ):
            yield
    finally:
        driver.set_active(before)


@contextlib.contextmanager
def collecting() -> Iterator[Collected]:
    """Within the block, collect what would be compiled; nothing is compiled or launched."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    found = Collected()
    launch = JITFunction.run
    launched: list[str] = found.items.setdefault("", [])

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def refuse(*, key: str, **_: Any) -> bool:
            key = f"{self.__name__} {key}"
            found.launches.setdefault(key, Launch(self, args, kwargs))
            launched.append(key)
            return True

        with mock.patch.object(knobs.runtime, "jit_cache_hook", refuse):
            launch(self, *args, grid=grid, warmup=True, **kwargs)

    with mock.patch.object(JITFunction, "run", run):
        yield found


def collect(items: Iterable[Item]) -> Collected:
    """Make the calls of the items, one after the other; an item that fails leaves the others."""
    with collecting() as found:
        launched = found.items.pop("")
        for name, run in items:
            launched.clear()
            try:
                run()
            except Exception as error:
                found.failures[name] = f"{type(error).__name__}: {error}"
            found.items[name] = list(dict.fromkeys(launched))
    return found


@dataclasses.dataclass
class CompiledHere:
    """Kernels that a process compiled itself, because they were not in the cache."""

    kernels: int = 0
    seconds: float = 0.0
    names: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def counting_compilations() -> Iterator[CompiledHere]:
    """Within the block, count the kernels that this process compiles."""
    from triton import knobs

    found = CompiledHere()

    def listen(*, metadata: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found.kernels += 1
            found.seconds += times.total / 1e6
            found.names.append(str(metadata.get("name")))

    with mock.patch.object(knobs.compilation, "listener", listen):
        yield found


# --- compiling -----------------------------------------------------------------------------------

_launches: list[Launch] = []  # of the processes that are forked from this one


def _seconds_used() -> float:
    """Processor seconds of this process and of those that it waited for (ptxas)."""
    own, others = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def _compile(number: int) -> tuple[int, dict[str, Any]]:
    """Compile one of the launches; return its number, and what is recorded of it."""
    launch = _launches[number]
    before, start = _seconds_used(), time.monotonic()
    found: dict[str, Any] = {"name": launch.name}
    try:
        compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:500]
    else:
        found["shared_memory"] = compiled.metadata.shared
        found["processor_seconds"] = _seconds_used() - before
        found["seconds"] = time.monotonic() - start
        from .triton_resources import nvidia_counts

        found["registers"], found["spilled_bytes"] = nvidia_counts(compiled.asm["cubin"])
    return number, found


def compile_all(
    launches: Sequence[Launch],
    processes: int,
    seconds: float = math.inf,
    report: Callable[[int, dict[str, Any]], None] = lambda number, found: None,
) -> None:
    """Compile the launches in forked processes, in order, until the time is over.

    Args:
        report: is called with the number of a launch and what was found.
    """
    if not launches:
        return
    _launches[:] = launches
    end = time.monotonic() + seconds
    with multiprocessing.get_context("fork").Pool(min(processes, len(launches))) as pool:
        results = pool.imap_unordered(_compile, range(len(launches)))
        for _ in launches:
            try:
                report(
                    *results.next(max(0.0, end - time.monotonic()) if seconds < math.inf else None)
                )
            except multiprocessing.TimeoutError:
                break  # leaving the block ends the processes


def items_of(parts: Sequence[str]) -> Iterator[Item]:
    """The items of the parts of ``bench.gpu`` that launch our kernels, the most valuable first."""
    from . import gpu_checks, gpu_info_nce, gpu_kernels, gpu_times, gpu_tools

    makers: dict[str, tuple[Callable[[torch.device], Iterator[Item]], ...]] = {
        "kernels": (gpu_kernels.items,),
        "step": (gpu_times.items,),
        "correct": (gpu_checks.items,),
        "properties": (gpu_checks.property_items,),
        "sanitize": (gpu_tools.items,),
        "tune": (gpu_kernels.tuner_items, gpu_times.items),
        "tuned": (gpu_kernels.items, gpu_times.items),
        "info_nce": (gpu_info_nce.items,),
        "sweep": (gpu_times.sweep_items,),
        "others": (gpu_times.other_items, gpu_times.items),
    }
    for part in parts:
        for items in makers.get(part, ()):
            for name, run in items(META):
                yield f"{part}: {name}", run


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, compile, and write the record; return 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", help="parts of bench.gpu")
    parser.add_argument("--json", required=True, help="write the record to this file")
    parser.add_argument("--gpu", default=H200, help="its name, by which the tuning table is found")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--every", type=int, default=1, help="compile one kernel of so many")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with instead_of_a_gpu(arguments.gpu, arguments.capability, arguments.multiprocessors):
        found = collect(items_of(arguments.parts))
        keys = list(found.launches)
        numbers = {key: number for number, key in enumerate(keys)}
        record: dict[str, Any] = {
            "gpu": arguments.gpu,
            "capability": arguments.capability,
            "processes": arguments.processes,
            "seconds_collecting": time.monotonic() - start,
            "kernels_in_all": len(keys),
            "failures": found.failures,
            "items": {name: [numbers[key] for key in ks] for name, ks in found.items.items()},
            "kernels": {},
        }
        chosen = keys[:: arguments.every]
        written = 0.0

        def write() -> None:
            kernels = record["kernels"].values()
            record["seconds"] = time.monotonic() - start
            record["processor_seconds"] = sum(k.get("processor_seconds", 0) for k in kernels)
            write_json(arguments.json, record)

        def report(number: int, kernel: dict[str, Any]) -> None:
            nonlocal written
            record["kernels"][str(numbers[chosen[number]])] = kernel
            if time.monotonic() > written + 5:
                write()
                written = time.monotonic()

        launches = [found.launches[key] for key in chosen]
        compile_all(launches, arguments.processes, arguments.seconds, report)
        write()
    wrong = [k for k in record["kernels"].values() if "error" in k]
    print(
        f"{len(record['kernels'])} of {len(keys)} kernels in {record['seconds']:.0f} s "
        f"({record['processor_seconds']:.0f} processor seconds), {len(wrong)} failed; "
        f"{len(found.failures)} items failed"
    )
    for line in [*map(json.dumps, wrong), *map(str, found.failures.items())]:
        print(f"PROBLEM {line}", file=sys.stderr)
    return 1 if wrong or found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
