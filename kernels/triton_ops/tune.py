"""A search for tile sizes of the products of one expert MLP, timed on this GPU.

The search runs only when it is called. For each product a dozen configurations (``candidates.py``)
are compiled in parallel and timed. What time is left goes to coordinate descent from the best of
them: one setting at a time is changed to its next value up or down, and the change is kept if it is
faster. ``grouped_mm`` is tried as well. A configuration that does not fit the GPU, spills many
registers or gives other results is never chosen.
"""

from __future__ import annotations

import functools
import os
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from . import launch_config
from .candidates import curated
from .compile_ahead import compile_ahead
from .config import IMPLEMENTATIONS, Config, heuristic, why_not
from .grad_hidden import grad_hidden
from .grad_weight import grad_weight
from .launch_config import config_for
from .linear import linear
from .numerics import INTERPRETED
from .padded_plan import pad_plan, padded_rows, sort_rows
from .plan import plan
from .tuning_tables import table_key
from .up_projection import up_projection

# The values that each setting can take. The first are changed first: those that most often help.
AXES: Mapping[str, tuple[int, ...]] = dict(
    num_stages=(1, 2, 3, 4, 5),
    group_m=(1, 4, 8, 16),
    num_warps=(4, 8),
    block_n=(16, 32, 64, 128, 256),
    block_m=(16, 32, 64, 128, 256),
    block_k=(16, 32, 64, 128),
)
# Registers that a thread may spill, as the driver counts them: 64 bytes. So few are spilled once
# per tile; a kernel with more spills them inside its main loop.
MOST_SPILLS = 16
# Kernels that are compiled at a time; each takes about 1 GB.
_WORKERS = min(16, os.cpu_count() or 1)
# A difference smaller than this is noise.
GAIN = 0.98
# Two configurations add the same terms in another order; wrong results differ far more than this.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# Returns the milliseconds of a launch with a configuration.
Timer = Callable[[Callable[[Config], object], Config], float]


@dataclass(frozen=True)
class Problem:
    """The sizes of a mixture and a batch: T tokens choose K of E experts each, evenly.

    Attributes:
        target: "mlp", or "intermediate" or "output" if only that projection has experts.
    """

    tokens: int
    experts: int
    k: int
    dim: int
    hidden: int
    dtype: torch.dtype
    gated: bool = False
    target: str = "mlp"

    @property
    def width(self) -> int:
        """Columns of z."""
        return 2 * self.hidden if self.gated else self.hidden

    def __post_init__(self) -> None:
        for name in ("tokens", "experts", "k", "dim", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.k > self.experts:
            raise ValueError(f"k must be at most experts = {self.experts}; got {self.k}.")
        if self.target not in ("mlp", "intermediate", "output"):
            raise ValueError(f"target must be mlp, intermediate or output; got {self.target!r}.")
        if self.dtype not in _TOLERANCES:
            names = ", ".join(str(d).removeprefix("torch.") for d in _TOLERANCES)
            raise ValueError(f"dtype must be one of {names}; got {self.dtype}.")


@dataclass(frozen=True)
class Product:
    """One grouped product.

    Attributes:
        name: what it computes.
        kernel, n, k: the key of its configuration.
        launch: launches it with a configuration, and returns what all of them must agree on.
        padded: whether its rows are padded.
        gathered: whether rows of an operand are gathered.
    """

    name: str
    kernel: str
    n: int
    k: int
    launch: Callable[[Config], Tensor]
    padded: bool = False
    gathered: bool = False


@dataclass(frozen=True)
class Choice:
    """The result for a product.

    Attributes:
        before, after: the configuration that was in use, and the one to use.
        before_ms, after_ms: their times.
        tried: how many were tried.
        fastest: the fastest configuration and its time of each implementation.
    """

    product: str
    before: Config
    after: Config
    before_ms: float
    after_ms: float
    tried: int
    fastest: Mapping[str, tuple[Config, float]]

    def with_after(self, config: Config, ms: float) -> Choice:
        """The same with another configuration to use."""
        return replace(self, after=config, after_ms=ms)


def products(problem: Problem, device: torch.device) -> Iterator[Product]:
    """The products of the mixture's forward and backward, on random data."""

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(problem.dtype)

    ids = torch.rand(problem.tokens, problem.experts, device=device).topk(problem.k).indices
    weights = torch.rand(problem.tokens * problem.k, device=device)
    rows = plan(ids, problem.experts)[:3]
    make = _mlp_products if problem.target == "mlp" else _linear_products
    return make(problem, new, weights, rows)


def _mlp_products(
    problem: Problem, new: Callable[..., Tensor], weights: Tensor, rows: tuple[Tensor, ...]
) -> Iterator[Product]:
    """The six products of the expert MLP, on rows that are padded where the op pads them."""
    p, width = problem, problem.width
    x, grad = new(p.tokens, p.dim), new(p.tokens, p.dim)
    w1, b1 = new(p.experts, width, p.dim, scale=p.dim**-0.5), new(p.experts, width)
    w2, b2 = new(p.experts, p.dim, p.hidden, scale=p.hidden**-0.5), new(p.experts, p.dim)
    padded = None
    if launch_config.pads_experts(x, len(weights), p.experts):
        padded = pad_plan(rows)
        rows, x, grad = padded[:3], sort_rows(x, padded), sort_rows(grad, padded)
    pads, one = padded is not None, p.k == 1  # K = 1: rows are written in token order
    valid = len(rows[1]) if x.is_meta else int(rows[0][-1])  # the rows behind are not written
    act = dict(act="silu" if p.gated else "gelu", gated=p.gated)
    form = dict(**act, gather=not pads, padded=pads)
    to = dict(gather=False, padded=padded)
    z, h = up_projection(x, w1, b1, *rows[:2], **form, want_z=True, want_h=True)
    dz, wh, _, _ = grad_hidden(grad, w2, z, weights, rows, **form, want_bias=True)
    kind = dict(padded=pads, gathered=not pads)

    def by_row(out: Tensor) -> Tensor:
        return out if one else out[:valid]

    yield Product(
        "up", "gated_up" if p.gated else "up", p.hidden, p.dim,
        lambda c: up_projection(
            x, w1, b1, *rows[:2], **form, want_z=True, want_h=True, config=c
        )[1][:valid],
        **kind,
    )  # fmt: skip
    yield Product(
        "down", "linear", p.dim, p.hidden,
        lambda c: by_row(
            linear(h, w2, b2, weights if one else None, rows, **to, scatter=one, config=c)
        ),
        **kind,
    )  # fmt: skip
    yield Product(
        "grad_hidden", "gated_grad_hidden" if p.gated else "grad_hidden", p.hidden, p.dim,
        lambda c: grad_hidden(
            grad, w2, z, weights, rows, **form, want_bias=True, config=c
        )[0][:valid],
        **kind,
    )  # fmt: skip
    yield Product(
        "grad_x", "linear_transposed", p.dim, width,
        lambda c: by_row(linear(dz, w1.mT, None, None, rows, **to, scatter=one, config=c)),
        **kind,
    )  # fmt: skip
    yield Product(
        "grad_down", "grad_weight", p.hidden, p.dim,
        lambda c: grad_weight(
            grad, wh, None, rows, gather_a=not pads, gather_b=False, padded=pads, config=c
        ),
        **kind,
    )  # fmt: skip
    yield Product(
        "grad_up", "grad_weight", p.dim, width,
        lambda c: grad_weight(
            dz, x, None, rows, gather_a=False, gather_b=not pads, padded=pads, config=c
        ),
        **kind,
    )  # fmt: skip


def _linear_products(
    problem: Problem, new: Callable[..., Tensor], weights: Tensor, rows: tuple[Tensor, ...]
) -> Iterator[Product]:
    """The three products of a mixture in which one projection has experts."""
    p, one = problem, problem.k == 1
    inner, outer = (p.dim, p.width) if p.target == "intermediate" else (p.hidden, p.dim)
    x, grad = new(p.tokens, inner), new(p.tokens, outer)
    w, b = new(p.experts, outer, inner, scale=inner**-0.5), new(p.experts, outer)
    row_weights = weights if one else None

    yield Product(
        "linear", "linear", outer, inner,
        lambda c: linear(x, w, b, row_weights, rows, gather=True, scatter=one, config=c),
        gathered=True,
    )  # fmt: skip
    yield Product(
        "grad_x", "linear_transposed", inner, outer,
        lambda c: linear(grad, w.mT, None, None, rows, gather=True, scatter=False, config=c),
        gathered=True,
    )  # fmt: skip
    yield Product(
        "grad_weight", "grad_weight", inner, outer,
        lambda c: grad_weight(grad, x, weights, rows, gather_a=True, gather_b=True, config=c),
        gathered=True,
    )  # fmt: skip


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ from ``config`` in one setting, by one step of :data:`AXES`."""
    yield replace(config, descriptors=not config.descriptors)
    for name, values in AXES.items():
        here = getattr(config, name)
        below, above = [v for v in values if v < here], [v for v in values if v > here]
        for value in (*above[:1], *below[-1:]):
            yield replace(config, **{name: value})


def descend(
    start: Config, cost: Callable[[Config], float], out_of_time: Callable[[], bool]
) -> dict[Config, float]:
    """Coordinate descent; returns all configurations tried with their costs, the start first.

    It stops when no neighbour is better, or when ``out_of_time`` returns True.
    """
    tried = {start: cost(start)}
    best = start
    while True:
        for candidate in neighbours(best):
            if candidate in tried:
                continue
            if out_of_time():
                return tried
            tried[candidate] = cost(candidate)
            if tried[candidate] < GAIN * tried[best]:
                best = candidate
                break
        else:
            return tried


def milliseconds(launch: Callable[[Config], object], config: Config) -> float:
    """The median time of a launch; in the interpreter, the time of one launch."""
    if INTERPRETED:
        return 1e3 * timeit.timeit(lambda: launch(config), number=1)
    return triton.testing.do_bench(lambda: launch(config), warmup=10, rep=50, return_mode="median")


def search(
    problem: Problem, device: torch.device, *, seconds: float, timer: Timer = milliseconds
) -> dict[str, Choice]:
    """Tile sizes for the products of ``problem``, by the keys of the tuning table.

    Args:
        problem: the sizes to tune for.
        device: a GPU, or the CPU where kernels are interpreted.
        seconds: how long to search, divided evenly among the products; at least one
            configuration of each is timed.
        timer: how launches are timed.

    Raises:
        ValueError: for ``seconds`` that are not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds}.")
    start = time.monotonic()
    found, todo = {}, list(products(problem, device))
    for number, product in enumerate(todo, 1):
        deadline = start + seconds * number / len(todo)
        choice = _tune(problem, product, device, deadline, timer)
        rows = _rows(problem, product)
        key = table_key(product.kernel, product.n, product.k, rows, problem.dtype)
        found[key] = choice
    return found


def layers(choices: Mapping[str, Choice]) -> dict[str, dict[str, Choice]]:
    """Choices for a whole layer, by name, to be timed against each other.

    A product alone has the cache to itself; in a layer it follows another one. "before" is what was
    in use and "found" the fastest of every product; "triton" and "grouped_mm" have that
    implementation wherever it can compute.
    """
    named = {"before": {key: c.with_after(c.before, c.before_ms) for key, c in choices.items()}}
    named["found"] = dict(choices)
    for name in IMPLEMENTATIONS:
        named[name] = {
            key: c.with_after(*c.fastest[name]) if name in c.fastest else c
            for key, c in choices.items()
        }
    different: dict[str, dict[str, Choice]] = {}
    for name, found in named.items():
        configs = [c.after for c in found.values()]
        if all(configs != [c.after for c in other.values()] for other in different.values()):
            different[name] = found
    return different


def _rows(problem: Problem, product: Product) -> int:
    """Rows per expert, as launchers count them."""
    count = problem.tokens * problem.k
    return (padded_rows(count, problem.experts) if product.padded else count) // problem.experts


def candidates(problem: Problem, product: Product, device: torch.device) -> list[Config]:
    """The configurations of our kernel that are tried first.

    The first of them is the one in use, or the heuristic's where ``grouped_mm`` is in use.
    """
    start, target = _in_use(problem, product, device), launch_config.target_of(device.index)
    shape = (product.kernel, problem.dtype, target, product.n, product.k)
    if start.implementation != "triton":
        start = heuristic(*shape, _rows(problem, product))
    return curated(start, *shape, padded=product.padded, gathered=product.gathered)


def by_grouped_mm(problem: Problem, product: Product, device: torch.device) -> Config | None:
    """The configuration by which ``grouped_mm`` computes a product; ``None`` if it cannot."""
    config = Config(implementation="grouped_mm")
    target = launch_config.target_of(device.index)
    reason = why_not(config, product.kernel, problem.dtype, target, product.n, product.k)
    return config if reason is None else None


def _in_use(problem: Problem, product: Product, device: torch.device) -> Config:
    like = torch.empty(0, dtype=problem.dtype, device=device)
    rows = _rows(problem, product)
    return config_for(product.kernel, like, product.n, product.k, rows, product.gathered)


def _tune(
    problem: Problem, product: Product, device: torch.device, deadline: float, timer: Timer
) -> Choice:
    """The fastest configuration found until ``deadline`` that gives the same result."""
    before = _in_use(problem, product, device)
    target = launch_config.target_of(device.index)

    def fits(config: Config) -> bool:
        shape = (product.kernel, problem.dtype, target, product.n, product.k)
        return not why_not(config, *shape, product.gathered)

    @functools.cache
    def cost(config: Config) -> float:
        if not fits(config) or (config != before and not compiles_well(product, [config])):
            return float("inf")
        try:
            return timer(product.launch, config)
        except (OutOfResources, PTXASError):
            return float("inf")
        except RuntimeError:  # refused by grouped_mm or by the driver's descriptors
            if config.implementation == "triton" and not config.descriptors:
                raise
            return float("inf")

    def out_of_time() -> bool:
        return time.monotonic() > deadline

    tried = {}
    theirs = by_grouped_mm(problem, product, device)
    if theirs is not None:
        tried[theirs] = cost(theirs)
    first = candidates(problem, product, device)
    compiles_well(product, first)  # at once; then cost finds them compiled
    ours = {first[0]: cost(first[0])}
    for config in first[1:]:
        if out_of_time():
            break
        ours[config] = cost(config)
    tried |= ours | descend(min(ours, key=lambda c: ours[c]), cost, out_of_time)
    expected = product.launch(before)
    fastest: dict[str, tuple[Config, float]] = {}
    for config in sorted(tried, key=lambda c: tried[c]):
        known = config.implementation in fastest or tried[config] == float("inf")
        if not known and (config == before or _agree(product.launch(config), expected)):
            fastest[config.implementation] = config, tried[config]
    kept = Choice(product.name, before, before, cost(before), cost(before), len(tried), fastest)
    for after, _ in sorted(fastest.values(), key=lambda found: found[1])[:1]:
        # Both are timed again, one right after the other, because the search took long.
        times = [timer(product.launch, config) for config in (before, after)]
        if times[1] < GAIN * times[0]:
            return replace(kept, before_ms=times[0]).with_after(after, times[1])
    return kept


def compiles_well(product: Product, configs: Sequence[Config]) -> list[Config]:
    """Compile the configurations of our kernels in parallel; return those fit to be launched.

    These are all that compile, and spill no more registers than :data:`MOST_SPILLS`.
    """
    ours = [c for c in configs if c.implementation == "triton" and not INTERPRETED]
    launches = [functools.partial(product.launch, config) for config in ours]
    found = dict(zip(ours, compile_ahead(launches, _WORKERS), strict=True)) if ours else {}
    return [c for c in configs if c not in found or spills(found[c]) <= MOST_SPILLS]


def spills(kernels: Sequence[Any] | Exception) -> float:
    """The most registers that a thread of the kernels spills; infinite if they cannot run here."""
    if isinstance(kernels, Exception):
        return float("inf")
    try:
        for kernel in kernels:
            kernel.run  # noqa: B018 - loads the kernel; the driver then says what it takes
    except (OutOfResources, PTXASError):
        return float("inf")
    return max((kernel.n_spills for kernel in kernels), default=0)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding alone, judged by the norm of their difference."""
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCES[expected.dtype] * expected.float().norm())
