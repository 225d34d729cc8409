"""Compile every Triton kernel ahead of time, as it would be launched, and list its resources.

    python -m bench.triton_resources --write docs/kernels-resources.json

No GPU is needed. Forward and backward of the ops run on "meta" tensors of real sizes. Each kernel
launch is recorded with the types and the divisibility that Triton's launcher would find, and
compiled for every target. Registers, spills and shared memory are read from the compiled code. The
committed table then shows in review what a change of a kernel costs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import triton_code
from .problem import Shape

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Patterns of the instructions for products of 16-bit operands on tensor cores.
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
}
PRODUCTS = (
    *("up_kernel", "linear_kernel", "grad_hidden_kernel", "grad_weight_kernel"),
    "persistent_linear_kernel",
    *("own_logits_kernel", "info_nce_kernel", "info_nce_grad_kernel", "add_product_kernel"),
)


# BERT-base, and an odd shape that uses the masked paths. Left out are float16, which differs from
# bfloat16 only in a type, and the odd shape in TF32, which differs from float32 only in a flag.
_BASE = Shape(65_536, experts=8, k=1, dim=768, hidden=3072, dtype=torch.bfloat16)
_ODD = Shape(1_001, experts=3, k=1, dim=389, hidden=1019, dtype=torch.bfloat16)
# Tiles of persistent programs; 4 warps multiply and store, and others copy.
PERSISTENT: dict[str, Any] = dict(
    block_m=128, block_n=256, block_k=64, num_warps=4, num_stages=4, persistent=True
)
# Bytes per thread that a kernel with limited registers may spill outside of its main loop.
_MOST_SPILLED = 64
TF32 = "tf32"  # the problem whose float32 products are rounded to TF32
PROBLEMS = {
    "bfloat16": _BASE,
    "float32": dataclasses.replace(_BASE, dtype=torch.float32),
    TF32: dataclasses.replace(_BASE, dtype=torch.float32),
    "bfloat16-odd": _ODD,
    "float32-odd": dataclasses.replace(_ODD, dtype=torch.float32),
    "bfloat16-few": dataclasses.replace(_BASE, tokens=128),  # rows per expert
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch, with everything that is needed to compile it again."""

    kernel: Any  # triton.JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's name, and the settings that distinguish its variants."""
        shown = [f"{n}={v}" for n, v in self.constants if n.isupper() and v is not None]
        pointers = sorted(
            {t for _, t in self.signature if t.startswith("*")} - {"*i64", "*i32", "*u1"}
        )
        options = [f"{n}={v}" for n, v in self.options]
        return " ".join([self.kernel.__name__, *shown, *options, *pointers])


@dataclasses.dataclass(frozen=True)
class Resources:
    """The resources that a compiled kernel uses.

    Attributes:
        registers: per thread.
        spills: per thread, in bytes; on gfx942 in registers.
        shared_memory: bytes per program.
        tensor_cores: whether products run on tensor cores.
        tile_copies: whether the TMA unit copies operand tiles.
        specialized: whether warps have different tasks.
        buffers: operand tiles that the pipeline holds at a time; here and below 0 for kernels
            without products, and for gfx942.
        instructions, epilogue: all instructions, and those behind the main loop.
        loop_spills: instructions of the main loop that read or write spilled registers.
    """

    registers: int
    spills: int
    shared_memory: int
    tensor_cores: bool
    tile_copies: bool
    specialized: bool = False
    buffers: int = 0
    instructions: int = 0
    epilogue: int = 0
    loop_spills: int = 0


# --- recording launches --------------------------------------------------------------------------


def as_launch(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    """Convert the arguments in the way in which Triton's launcher would."""
    from triton.runtime.jit import mangle_type

    names = [p.name for p in kernel.params]
    given = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        plain = isinstance(value, int) and not parameter.do_not_specialize
        number = value if plain else None
        if parameter.is_constexpr or value is None or number == 1:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        signature.append((parameter.name, mangle_type(value)))
        # torch's allocator aligns to far more than 16 bytes
        if isinstance(value, Tensor) or (number is not None and number % 16 == 0):
            divisible.append(position)
    options = tuple((n, v) for n, v in sorted(kwargs.items()) if n not in names)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), options)


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Within the block, collect kernel launches as on ``target``, instead of running them."""
    from moe_fast.triton_ops import launch_config
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = as_launch(self, args, kwargs)
        if launch not in launches:
            launches.append(launch)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch_config, "target_of", lambda index: target),
        mock.patch.object(launch_config, "multiprocessors", lambda index: 132),  # an H200's
        # No table has this name, so the heuristic's configurations are used.
        mock.patch.object(launch_config, "gpu_name", lambda device: target),
    ):
        yield launches


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Within the block, round float32 products to TF32 if ``wanted``, as users can allow."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def launch_everything(shape: Shape) -> None:
    """Launch forward and backward of every op, in every form that has its own kernels."""
    from moe_fast.triton_ops import launch_config
    from moe_fast.triton_ops.plan import plan

    for k in (1, 2):
        routed = dataclasses.replace(shape, k=k)
        order = plan(_new(shape.tokens, k, dtype=torch.int64), shape.experts)
        for gated in (False, True):
            mixture = dataclasses.replace(routed, gated=gated, bias=not gated)
            _expert_mlp(mixture, order)
            with mock.patch.object(launch_config, "pads_experts", lambda *_: False):
                _expert_mlp(mixture, order)  # as with fewer rows per expert
        _expert_linear(routed, order)
        _output_block(routed, order[3])
    _by_descriptors(shape, order)
    _by_persistent_programs(shape, order[:3])
    _around_grouped_mm(shape, order)
    for mode, weight_mode, k in (
        ("token_topk", "straight_through", 1),
        ("token_topk", "renormalize", 2),
        ("token_topk", "probability", 2),
        ("sentence_topk", "renormalize", 2),
        ("dense", "probability", shape.experts),
    ):
        _route(shape, mode, weight_mode, k)
    for form in ("symmetric", "one way", "masks", "everything"):
        _info_nce(shape, form)
    if shape == PROBLEMS["bfloat16"]:  # float16's backward products run in TF32
        _info_nce(dataclasses.replace(shape, dtype=torch.float16), "symmetric")


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _expert_mlp(shape: Shape, plan: tuple[Tensor, ...]) -> None:
    from moe_fast.ops.expert_mlp.triton import forward, gradients

    s, dtype = shape, shape.dtype
    tensors = (
        _new(s.tokens, s.dim, dtype=dtype),
        _new(s.experts, s.width, s.dim, dtype=dtype),
        _new(s.experts, s.dim, s.hidden, dtype=dtype),
        _new(s.experts, s.width, dtype=dtype) if s.bias else None,
        _new(s.experts, s.dim, dtype=dtype) if s.bias else None,
        _new(s.tokens, s.k, dtype=torch.float32),
        *plan,
    )
    for save in (True, False):
        y, z = forward(*tensors, "gelu", s.gated, save)
        gradients(y, *tensors, z, "gelu", s.gated)


def _expert_linear(shape: Shape, plan: tuple[Tensor, ...]) -> None:
    from moe_fast.ops.expert_linear.triton import forward, gradients

    s, dtype = shape, shape.dtype
    tensors = (
        _new(s.tokens, s.dim, dtype=dtype),
        _new(s.experts, s.hidden, s.dim, dtype=dtype),
        _new(s.experts, s.hidden, dtype=dtype),
        _new(s.tokens, s.k, dtype=torch.float32),
        *plan,
    )
    gradients(forward(*tensors), *tensors)


def _output_block(shape: Shape, slot_to_row: Tensor) -> None:
    from moe_fast.triton_ops.combine_norm import combine_norm, combine_norm_backward

    s, dtype = shape, shape.dtype
    rows, residual = _new(s.tokens * s.k, s.dim, dtype=dtype), _new(s.tokens, s.dim, dtype=dtype)
    weights, gamma = _new(s.tokens, s.k, dtype=torch.float32), _new(s.dim, dtype=dtype)
    for keep in (None, _new(s.tokens, s.dim, dtype=torch.bool)):  # dropout or none
        block = (residual, keep, gamma, gamma)
        for save in (False, True):
            y, total, moments = combine_norm(
                rows, slot_to_row, weights, *block, scale=1 / 0.9, eps=1e-12, save=save
            )
        combine_norm_backward(y, total, moments, keep, gamma, scale=1 / 0.9, like=rows)


def _by_descriptors(shape: Shape, plan: tuple[Tensor, ...]) -> None:
    """Launch the shipped tiles with descriptors instead of pointers, if the target has them."""
    from moe_fast.triton_ops import launch_config
    from moe_fast.triton_ops.config import why_not
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.up_projection import up_projection

    s, dtype, target = shape, shape.dtype, launch_config.target_of(None)
    x = _new(s.tokens, s.dim, dtype=dtype)
    rows, h = plan[:3], _new(len(plan[1]), s.hidden, dtype=dtype)
    down = _new(s.experts, s.dim, s.hidden, dtype=dtype)
    bias, weights = _new(s.experts, s.dim, dtype=dtype), _new(len(plan[1]), dtype=torch.float32)

    def config(kernel: str, n: int, k: int) -> Any:
        found = launch_config.config_for(kernel, x, n, k, s.tokens // s.experts)
        found = dataclasses.replace(found, descriptors=True)
        return None if why_not(found, kernel, dtype, target, n, k) else found

    for kernel, gated in (("up", False), ("gated_up", True)):
        if found := config(kernel, s.hidden, s.dim):
            w = _new(s.experts, s.hidden * (1 + gated), s.dim, dtype=dtype)
            form = dict(act="silu" if gated else "gelu", gated=gated, want_z=True, want_h=True)
            up_projection(x, w, None if gated else w[:, :, 0], *rows[:2], **form, config=found)
    if found := config("linear", s.dim, s.hidden):
        linear(h, down, bias, weights, rows, gather=False, scatter=True, config=found)
        linear(h, down, None, None, rows, gather=False, scatter=False, config=found)
    if found := config("linear_transposed", s.dim, s.hidden):
        up_proj = _new(s.experts, s.hidden, s.dim, dtype=dtype)
        linear(h, up_proj.mT, None, None, rows, gather=False, scatter=True, config=found)


def _by_persistent_programs(shape: Shape, plan: tuple[Tensor, ...]) -> None:
    """Launch the down projection and its gradient by programs that stay, if the target has them."""
    from moe_fast.triton_ops import launch_config
    from moe_fast.triton_ops.config import Config, why_not
    from moe_fast.triton_ops.linear import linear
    from moe_fast.triton_ops.padded_plan import pad_plan

    s, target, config = shape, launch_config.target_of(None), Config(**PERSISTENT)
    # The tiles are of 16-bit operands.
    if s.dtype.itemsize > 2 or why_not(config, "linear", s.dtype, target, s.dim, s.hidden):
        return
    padded = pad_plan(plan)
    h = _new(len(padded.row_to_token), s.hidden, dtype=s.dtype)
    down = _new(s.experts, s.dim, s.hidden, dtype=s.dtype)
    up = _new(s.experts, s.hidden, s.dim, dtype=s.dtype).mT
    bias, weights = _new(s.experts, s.dim, dtype=s.dtype), _new(len(plan[1]), dtype=torch.float32)
    form = dict(gather=False, padded=padded, config=config)
    linear(h, down, bias, weights, padded[:3], scatter=True, **form)
    linear(h, down, None, None, padded[:3], scatter=False, **form)
    linear(h, up, None, None, padded[:3], scatter=True, **form)


def _around_grouped_mm(shape: Shape, plan: tuple[Tensor, ...]) -> None:
    from moe_fast.triton_ops.grouped_mm import zero_empty
    from moe_fast.triton_ops.row_epilogue import row_epilogue

    s, dtype = shape, shape.dtype
    rows, bias = _new(len(plan[1]), s.dim, dtype=dtype), _new(s.experts, s.dim, dtype=dtype)
    weights = _new(len(plan[1]), dtype=torch.float32)
    for b, w, scatter in ((bias, weights, True), (bias, None, False), (None, weights, False)):
        row_epilogue(rows, b, w, plan[:3], torch.empty_like(rows) if scatter else None)
    zero_empty(_new(s.experts, s.dim, s.hidden, dtype=dtype), plan[0])


def _route(shape: Shape, mode: str, weight_mode: str, k: int) -> None:
    from moe_fast.triton_ops.route import route
    from moe_fast.triton_ops.route_grad import route_backward
    from moe_fast.triton_ops.top_k import RouteSettings

    x = _new(shape.tokens, shape.dim, dtype=shape.dtype)
    router_weight = _new(shape.experts, shape.dim, dtype=shape.dtype)
    mask = _new(shape.tokens, dtype=torch.bool)
    starts = _new(129, dtype=torch.int64)
    settings = RouteSettings(k, weight_mode, mode == "sentence_topk", mode == "dense")
    weights, logits, _, _ = route(x, router_weight, settings, mask, starts, torch.float32)
    route_backward(weights, logits, x, router_weight, logits, settings, mask, starts)


def _info_nce(shape: Shape, form: str) -> None:
    """Launch the loss on T pairs; ``form`` selects similarity, directions and masks.

    ``one way``: dot products in one direction; other forms: cosines in both. ``masks``: texts and
    domains; ``everything``: also hard negatives, groups and smoothing.
    """
    from moe_fast.ops.info_nce.triton import forward, gradients

    size, everything = shape.tokens, form == "everything"
    lengths = (size, 2 * size if everything else size, size, size if everything else None)
    ids = [
        None if n is None or form in ("symmetric", "one way") else _new(n, dtype=torch.int64)
        for n in lengths
    ]
    x = _new(size, shape.dim, dtype=shape.dtype)
    tensors = (x, x, x if everything else None, _new(dtype=torch.float32), *ids, None)
    settings = (0.1 if everything else 0.0, form != "one way", form != "one way")
    loss, _, _, *sums = forward(*tensors, *settings)
    gradients(loss, *tensors, *sums, *settings)


# --- compiling -----------------------------------------------------------------------------------


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for ``target``, and read the resources from the code."""
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
    read: dict[str, Any] = {}
    if hip:
        code = compiled.asm["amdgcn"]
        registers, spills = _numbers(r"\.vgpr_count:\s+(\d+).*\.vgpr_spill_count:\s+(\d+)", code)
    else:
        code = compiled.asm["ptx"]
        registers, spills = nvidia_counts(compiled.asm["cubin"])
        if launch.kernel.__name__ in PRODUCTS:
            found = triton_code.read_code(compiled.asm["cubin"])
            read = dict(
                specialized="ttg.warp_specialize" in compiled.asm["ttgir"],
                buffers=triton_code.buffers(compiled.asm),
                instructions=found.instructions,
                epilogue=found.tail,
                loop_spills=found.loop_spills,
            )
    cores = re.search(TENSOR_CORES[target], code) is not None
    copies = re.search(r"cp\.async\.bulk\.tensor\S*\.global", code) is not None
    return Resources(registers, spills, compiled.metadata.shared, cores, copies, **read)


def _numbers(pattern: str, text: str) -> tuple[int, int]:
    """Return the two numbers that a pattern finds in ``text``; ``RuntimeError`` if it fails."""
    found = re.search(pattern, text, re.DOTALL)
    if found is None:
        raise RuntimeError(f"no registers and spills in: {text[-2000:]}")
    return int(found[1]), int(found[2])


def nvidia_counts(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes; the stack holds only spills, for lack of arrays."""
    return _numbers(r"REG:(\d+) STACK:(\d+)", triton_code.tool("cuobjdump", cubin, "-res-usage"))


def faults(launch: Launch, target: str, used: Resources) -> list[str]:
    """Return why a kernel must not ship for ``target``; empty if nothing is wrong."""
    from moe_fast.triton_ops.config import SHARED_MEMORY

    found = []
    # Registers that are spilled once per tile, by kernels that limit their registers, cost less
    # than the second program per multiprocessor gains; spilled at each step they do not.
    limited = "maxnreg" in dict(launch.options)
    if used.spills > (_MOST_SPILLED if limited else 0):
        found.append(f"{used.spills} spills")
    if used.loop_spills:
        found.append(f"{used.loop_spills} spills inside the main loop")
    if used.shared_memory > SHARED_MEMORY[target]:
        found.append(f"{used.shared_memory} bytes of shared memory > {SHARED_MEMORY[target]}")
    narrow = any(t in ("*bf16", "*fp16") for _, t in launch.signature)
    if narrow and launch.kernel.__name__ in PRODUCTS and not used.tensor_cores:
        found.append(f"no {TENSOR_CORES[target]}")
    persistent = launch.kernel.__name__ == "persistent_linear_kernel"
    if (persistent or dict(launch.constants).get("DESCRIPTORS")) and not used.tile_copies:
        found.append("descriptors, but no copies of tiles")
    if persistent and target == "sm_90" and not used.specialized:
        found.append("its warps are not specialised")
    return found


def launches_of(target: str, names: Sequence[str]) -> dict[str, Launch]:
    """Return the launches of the problems on ``target``, by unique names.

    Launches with the same name differ in divisibility, or in arguments that are 1; they are
    numbered.
    """
    with recorded(target) as launches:
        for name in names:
            with tf32(name == TF32):
                launch_everything(PROBLEMS[name])
    named, seen = {}, Counter[str]()
    for launch in launches:
        seen[launch.name] += 1
        number = seen[launch.name]
        named[launch.name if number == 1 else f"{launch.name} #{number}"] = launch
    return named


def measure(
    targets: Sequence[str],
    problems: Sequence[str],
    only: str = "",
    every: int = 1,
    workers: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Compile the launches of the problems; return a table of their resources, and the faults.

    The table maps target -> kernel -> resources.

    Args:
        targets, problems: names in ``TARGETS`` and ``PROBLEMS``.
        only: a regular expression for the kernels' names.
        every: compile only every n-th kernel, as a sample.
        workers: the number of kernels that are compiled at a time.
        report: is called with a line per kernel.
    """
    from moe_fast.triton_ops.compile_ahead import parsing_in_turn

    resources: dict[str, dict[str, dict]] = {}
    wrong: list[str] = []
    for target in targets:
        named = [(n, one) for n, one in launches_of(target, problems).items() if re.search(only, n)]
        named = named[::every]
        rows = resources.setdefault(target, {})
        with parsing_in_turn(), concurrent.futures.ThreadPoolExecutor(workers) as pool:
            launches = [launch for _, launch in named]
            compiled = pool.map(functools.partial(compile_launch, target=target), launches)
            for (name, launch), used in zip(named, compiled, strict=True):
                rows[name] = _shown(dataclasses.asdict(used))
                wrong += [f"{target} {name}: {p}" for p in faults(launch, target, used)]
                report(f"{target} {name}: {used}")
    return resources, wrong


def _shown(used: dict[str, Any]) -> dict[str, Any]:
    """Return the resources without the numbers that were not counted."""
    unread = {field.name: field.default for field in dataclasses.fields(Resources)}
    return {n: v for n, v in used.items() if unread[n] is dataclasses.MISSING or v}


def format_table(version: str, resources: dict[str, dict[str, dict]]) -> str:
    """Return JSON with a line per kernel, so that a diff shows each changed kernel."""
    targets = (
        f'  "{target}": {{\n'
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(used)}" for name, used in rows.items())
        + "\n  }"
        for target, rows in resources.items()
    )
    body = ",\n".join(targets)
    return f'{{\n "triton": "{version}",\n "resources": {{\n{body}\n }}\n}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and write the table; return 1 if a kernel must not ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--only", default="", help="regular expression on the kernels' names")
    parser.add_argument("--every", type=int, default=1, help="compile one kernel of so many")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="compile so many at once"
    )
    parser.add_argument("--write", type=Path, help="write the table to this JSON file")
    settings = vars(parser.parse_args(argv))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels are not compiled.")
    path = settings.pop("write")
    resources, wrong = measure(**settings, report=print)
    for line in wrong:
        print(f"PROBLEM {line}", file=sys.stderr)
    if path:
        import triton

        path.write_text(format_table(triton.__version__, resources))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
