"""Compile every Triton kernel ahead of time, as it would be launched, and read what it uses.

    python -m bench.triton_resources --write docs/kernels-resources.json

No GPU is needed. The ops' backward and forward run on "meta" tensors of real sizes; each kernel
launch is recorded with the types and the divisibility that Triton's launcher would find, and
compiled for every target: registers, spills and shared memory come from the compiled code. A
change of the table shows in review what a change of a kernel costs.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# How a product on tensor cores shows in the code, for 16-bit operands.
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
}
PRODUCTS = (
    *("up_kernel", "linear_kernel", "grad_hidden_kernel", "grad_weight_kernel"),
    *("own_logits_kernel", "info_nce_kernel", "info_nce_grad_kernel", "add_product_kernel"),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is compiled for: T tokens, E experts, D, H, a dtype, float32 products as TF32 or not."""

    tokens: int
    experts: int
    dim: int
    hidden: int
    dtype: torch.dtype
    tf32: bool = False


# BERT-base, and an odd shape that takes the masked paths. Left out: float16, which differs from
# bfloat16 in a type alone, and the odd shape in TF32, which differs from float32 in a flag.
_BASE, _ODD = (65_536, 8, 768, 3072), (1_001, 3, 389, 1019)
PROBLEMS = {
    "bfloat16": Problem(*_BASE, torch.bfloat16),
    "float32": Problem(*_BASE, torch.float32),
    "tf32": Problem(*_BASE, torch.float32, tf32=True),
    "bfloat16-odd": Problem(*_ODD, torch.bfloat16),
    "float32-odd": Problem(*_ODD, torch.float32),
    "bfloat16-few": Problem(128, *_BASE[1:], torch.bfloat16),  # rows per expert
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as launched: enough to compile it again."""

    kernel: Any  # triton.JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's name and the settings that tell its variants apart."""
        shown = [f"{n}={v}" for n, v in self.constants if n.isupper() and v is not None]
        pointers = sorted(
            {t for _, t in self.signature if t.startswith("*")} - {"*i64", "*i32", "*i1"}
        )
        options = [f"{n}={v}" for n, v in self.options]
        return " ".join([self.kernel.__name__, *shown, *options, *pointers])


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        registers: per thread.
        spills: per thread; bytes, on gfx942 registers.
        shared_memory: bytes per program.
        tensor_cores: whether products run on them.
        tile_copies: whether the TMA unit copies operand tiles.
    """

    registers: int
    spills: int
    shared_memory: int
    tensor_cores: bool
    tile_copies: bool


# --- recording launches --------------------------------------------------------------------------


def as_launch(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    """What Triton's launcher would make of the arguments."""
    names = [p.name for p in kernel.params]
    given = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if hasattr(value, "block_shape"):  # a tensor descriptor
            tile = f"{_pointer(value.base.dtype)[1:]}{list(value.block_shape)}"
            signature.append((parameter.name, f"tensordesc<{tile}>"))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, _pointer(value.dtype)))
            divisible.append(position)  # torch's allocator aligns to far more than 16 bytes
        elif parameter.is_constexpr or value is None or value == 1:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        else:
            signature.append((parameter.name, "i32" if value < 1 << 31 else "i64"))
            if value % 16 == 0:
                divisible.append(position)
    options = tuple((n, v) for n, v in sorted(kwargs.items()) if n not in names)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), options)


def _pointer(dtype: torch.dtype) -> str:
    names = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.int32: "i32",
        torch.int64: "i64",
        torch.bool: "i1",
    }
    return "*" + names[dtype]


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Collect kernel launches within the block instead of running them, as if on ``target``."""
    from moe_fast.triton_ops import launch_config
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    seen: set[Launch] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = as_launch(self, args, kwargs)
        if launch not in seen:
            seen.add(launch)
            launches.append(launch)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch_config, "target_of", lambda index: target),
        # The heuristic's configurations: no table goes by this name.
        mock.patch.object(launch_config, "gpu_name", lambda device: target),
    ):
        yield launches


@contextlib.contextmanager
def parsing_in_turn() -> Iterator[None]:
    """One ``ast.parse`` at a time: Python 3.11's counts its depth for all threads together."""
    lock, parse = threading.Lock(), ast.parse

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return parse(*args, **kwargs)

    with mock.patch.object(ast, "parse", locked):
        yield


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """float32 products rounded to TF32, as a user can allow them."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def launch_everything(problem: Problem) -> None:
    """Every op's forward and backward, in every form that has kernels of its own."""
    for k in (1, 2):
        plan = _plan(problem, k)
        for gated, act, bias in ((False, "gelu", True), (True, "gelu", False)):
            _expert_mlp(problem, k, plan, gated=gated, act=act, bias=bias)
        _expert_linear(problem, k, plan)
        _output_block(problem, k, plan[3])
    _by_descriptors(problem, plan)
    _around_grouped_mm(problem, plan)
    for mode, weight_mode, k in (
        ("token_topk", "straight_through", 1),
        ("token_topk", "renormalize", 2),
        ("token_topk", "probability", 2),
        ("sentence_topk", "renormalize", 2),
        ("dense", "probability", problem.experts),
    ):
        _route(problem, mode, weight_mode, k)
    for form in ("symmetric", "one way", "masks", "everything"):
        _info_nce(problem, form)
    if problem == PROBLEMS["bfloat16"]:  # float16's products of the backward are TF32's
        _info_nce(dataclasses.replace(problem, dtype=torch.float16), "symmetric")


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _plan(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe_fast.triton_ops.plan import plan

    return plan(_new(problem.tokens, k, dtype=torch.int64), problem.experts)


def _expert_mlp(
    problem: Problem, k: int, plan: tuple[Tensor, ...], *, gated: bool, act: str, bias: bool
) -> None:
    from moe_fast.ops.expert_mlp import triton as expert_mlp_triton

    p, dtype = problem, problem.dtype
    width = 2 * p.hidden if gated else p.hidden
    tensors: tuple[Any, ...] = (
        _new(p.tokens, p.dim, dtype=dtype),
        _new(p.experts, width, p.dim, dtype=dtype),
        _new(p.experts, p.dim, p.hidden, dtype=dtype),
        _new(p.experts, width, dtype=dtype) if bias else None,
        _new(p.experts, p.dim, dtype=dtype) if bias else None,
        _new(p.tokens, k, dtype=torch.float32),
        *plan,
    )
    forward: Callable[..., Any] = expert_mlp_triton.forward
    gradients: Callable[..., Any] = expert_mlp_triton.gradients
    for save in (True, False):
        y, z = forward(*tensors, act, gated, save)
        gradients(y, *tensors, z, act, gated)


def _expert_linear(problem: Problem, k: int, plan: tuple[Tensor, ...]) -> None:
    from moe_fast.ops.expert_linear import triton as expert_linear_triton

    p, dtype = problem, problem.dtype
    tensors: tuple[Any, ...] = (
        _new(p.tokens, p.dim, dtype=dtype),
        _new(p.experts, p.hidden, p.dim, dtype=dtype),
        _new(p.experts, p.hidden, dtype=dtype),
        _new(p.tokens, k, dtype=torch.float32),
        *plan,
    )
    y = expert_linear_triton.forward(*tensors)
    expert_linear_triton.gradients(y, *tensors)


def _output_block(problem: Problem, k: int, slot_to_row: Tensor) -> None:
    from moe_fast.triton_ops.combine_norm import combine_norm, combine_norm_backward

    p, dtype = problem, problem.dtype
    rows, residual = _new(p.tokens * k, p.dim, dtype=dtype), _new(p.tokens, p.dim, dtype=dtype)
    weights, gamma = _new(p.tokens, k, dtype=torch.float32), _new(p.dim, dtype=dtype)
    for keep in (None, _new(p.tokens, p.dim, dtype=torch.bool)):  # dropout or none
        block = (residual, keep, gamma, gamma)
        for save in (False, True):
            y, total, moments = combine_norm(
                rows, slot_to_row, weights, *block, scale=1 / 0.9, eps=1e-12, save=save
            )
        combine_norm_backward(y, total, moments, keep, gamma, scale=1 / 0.9, like=rows)


def _by_descriptors(problem: Problem, plan: tuple[Tensor, ...]) -> None:
    """The shipped tiles with descriptors instead of pointers, where the target has them."""
    from moe_fast.triton_ops import launch_config
    from moe_fast.triton_ops.config import why_not
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.up_projection import up_projection

    p, dtype, target = problem, problem.dtype, launch_config.target_of(None)
    x = _new(p.tokens, p.dim, dtype=dtype)
    rows, h = plan[:3], _new(len(plan[1]), p.hidden, dtype=dtype)
    down = _new(p.experts, p.dim, p.hidden, dtype=dtype)
    bias, weights = _new(p.experts, p.dim, dtype=dtype), _new(len(plan[1]), dtype=torch.float32)

    def config(kernel: str, n: int, k: int) -> Any:
        found = launch_config.config_for(kernel, x, n, k, p.tokens // p.experts)
        found = dataclasses.replace(found, descriptors=True)
        return None if why_not(found, kernel, dtype, target, n, k) else found

    for kernel, gated in (("up", False), ("gated_up", True)):
        if found := config(kernel, p.hidden, p.dim):
            w = _new(p.experts, p.hidden * (1 + gated), p.dim, dtype=dtype)
            form = dict(act="silu" if gated else "gelu", gated=gated, want_z=True, want_h=True)
            up_projection(x, w, None if gated else w[:, :, 0], *rows[:2], **form, config=found)
    if found := config("linear", p.dim, p.hidden):
        linear(h, down, bias, weights, *rows, gather=False, scatter=True, config=found)
        linear(h, down, None, None, *rows, gather=False, scatter=False, config=found)
    if found := config("linear_transposed", p.dim, p.hidden):
        up_proj = _new(p.experts, p.hidden, p.dim, dtype=dtype)
        linear(h, up_proj.mT, None, None, *rows, gather=False, scatter=True, config=found)


def _around_grouped_mm(problem: Problem, plan: tuple[Tensor, ...]) -> None:
    from moe_fast.triton_ops.grouped_mm import zero_empty
    from moe_fast.triton_ops.row_epilogue import row_epilogue

    p, dtype = problem, problem.dtype
    rows, bias = _new(len(plan[1]), p.dim, dtype=dtype), _new(p.experts, p.dim, dtype=dtype)
    weights = _new(len(plan[1]), dtype=torch.float32)
    for b, w, scatter in ((bias, weights, True), (bias, None, False), (None, weights, False)):
        row_epilogue(rows, b, w, *plan[:3], scatter=scatter)
    zero_empty(_new(p.experts, p.dim, p.hidden, dtype=dtype), plan[0])


def _route(problem: Problem, mode: str, weight_mode: str, k: int) -> None:
    from moe_fast.triton_ops.route import route
    from moe_fast.triton_ops.route_grad import route_backward
    from moe_fast.triton_ops.top_k import RouteSettings

    x = _new(problem.tokens, problem.dim, dtype=problem.dtype)
    router_weight = _new(problem.experts, problem.dim, dtype=problem.dtype)
    mask = _new(problem.tokens, dtype=torch.bool)
    starts = _new(129, dtype=torch.int64)
    settings = RouteSettings(k, weight_mode, mode == "sentence_topk", mode == "dense")
    weights, logits, _, _ = route(x, router_weight, settings, mask, starts, torch.float32)
    route_backward(weights, logits, x, router_weight, logits, settings, mask, starts)


def _info_nce(problem: Problem, form: str) -> None:
    """A batch of T pairs: dot products one way, or cosines both ways, without ids or with.

    ``masks``: texts and domains; ``everything``: hard negatives, groups and smoothing too.
    """
    from moe_fast.ops.info_nce import triton as info_nce_triton

    size, everything = problem.tokens, form == "everything"
    lengths = (size, 2 * size if everything else size, size, size if everything else None)
    ids = [
        None if n is None or form in ("symmetric", "one way") else _new(n, dtype=torch.int64)
        for n in lengths
    ]
    x = _new(size, problem.dim, dtype=problem.dtype)
    tensors = (x, x, x if everything else None, _new(dtype=torch.float32), *ids, None)
    settings = (0.1 if everything else 0.0, form != "one way", form != "one way")
    forward: Callable[..., Any] = info_nce_triton.forward
    gradients: Callable[..., Any] = info_nce_triton.gradients
    loss, _, _, *sums = forward(*tensors, *settings)
    gradients(loss, *tensors, *sums, *settings)


# --- compiling -----------------------------------------------------------------------------------


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for ``target`` and read what the code uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.divisible},
    )
    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    if hip:
        code = compiled.asm["amdgcn"]
        registers, spills = (_amd_count(code, n) for n in ("vgpr_count", "vgpr_spill_count"))
    else:
        code = compiled.asm["ptx"]
        registers, spills = _nvidia_counts(compiled.asm["cubin"])
    cores = re.search(TENSOR_CORES[target], code) is not None
    copies = re.search(r"cp\.async\.bulk\.tensor\S*\.global", code) is not None
    return Resources(registers, spills, compiled.metadata.shared, cores, copies)


def _amd_count(code: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", code)
    if found is None:
        raise RuntimeError(f"no {name} in the compiled code")
    return int(found[1])


def _nvidia_counts(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack: the kernels have no arrays, so that only spills take any."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump gives no registers: {usage.stdout}{usage.stderr}")
    return int(found[1]), int(found[2])


def faults(launch: Launch, target: str, used: Resources) -> list[str]:
    """Why a kernel must not ship for ``target``; empty where nothing is wrong."""
    from moe_fast.triton_ops.config import SHARED_MEMORY

    found = []
    if used.spills:
        found.append(f"{used.spills} spills")
    if used.shared_memory > SHARED_MEMORY[target]:
        found.append(f"{used.shared_memory} bytes of shared memory > {SHARED_MEMORY[target]}")
    narrow = any(t in ("*bf16", "*fp16") for _, t in launch.signature)
    if narrow and launch.kernel.__name__ in PRODUCTS and not used.tensor_cores:
        found.append(f"no {TENSOR_CORES[target]}")
    if dict(launch.constants).get("DESCRIPTORS") and not used.tile_copies:
        found.append("descriptors, but no copies of tiles")
    return found


def launches_of(target: str, names: Sequence[str]) -> dict[str, Launch]:
    """What the problems launch on ``target``, by a name of its own."""
    with recorded(target) as launches:
        for name in names:
            with tf32(PROBLEMS[name].tf32):
                launch_everything(PROBLEMS[name])
    named: dict[str, Launch] = {}
    for launch in launches:
        named[_unique(launch, named)] = launch
    return named


def measure(
    targets: Sequence[str],
    names: Sequence[str],
    only: str = "",
    every: int = 1,
    workers: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Compile what the problems launch: the table target -> kernel -> resources, and what is wrong.

    Args:
        targets, names: of ``TARGETS`` and ``PROBLEMS``.
        only: a regular expression on the kernels' names.
        every: compile one of so many, a sample.
        workers: kernels to compile at a time.
        report: gets a line per kernel.
    """
    resources: dict[str, dict[str, dict]] = {}
    wrong: list[str] = []
    for target in targets:
        named = [(n, one) for n, one in launches_of(target, names).items() if re.search(only, n)]
        named = named[::every]
        rows = resources.setdefault(target, {})
        with parsing_in_turn(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
            launches = [launch for _, launch in named]
            compiled = pool.map(functools.partial(compile_launch, target=target), launches)
            for (name, launch), used in zip(named, compiled, strict=True):
                rows[name] = dataclasses.asdict(used)
                wrong += [f"{target} {name}: {p}" for p in faults(launch, target, used)]
                report(f"{target} {name}: {used}")
    return resources, wrong


def format_table(version: str, resources: dict[str, dict[str, dict]]) -> str:
    """JSON with a line per kernel, so that a difference shows one."""
    targets = (
        f'  "{target}": {{\n'
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(used)}" for name, used in rows.items())
        + "\n  }"
        for target, rows in resources.items()
    )
    body = ",\n".join(targets)
    return f'{{\n "triton": "{version}",\n "resources": {{\n{body}\n }}\n}}\n'


def _unique(launch: Launch, rows: dict[str, Launch]) -> str:
    """Launches of one name differ in divisibility and in arguments that are 1: number them."""
    name, number = launch.name, 2
    while name in rows:
        name = f"{launch.name} #{number}"
        number += 1
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write the table. Exit code 1 if a kernel must not ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--only", default="", help="regular expression on the kernels' names")
    parser.add_argument("--every", type=int, default=1, help="compile one kernel of so many")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="compile so many at once"
    )
    parser.add_argument("--write", type=Path, help="write the table to this JSON file")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels are not compiled.")
    resources, wrong = measure(
        arguments.targets,
        arguments.problems,
        arguments.only,
        arguments.every,
        arguments.workers,
        print,
    )
    for line in wrong:
        print(f"PROBLEM {line}", file=sys.stderr)
    if arguments.write:
        import triton

        arguments.write.write_text(format_table(triton.__version__, resources))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
