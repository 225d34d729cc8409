"""Chooses the implementation of an op that runs; every implementation registers itself here.

There are four backends. ``torch`` is the reference and always available. ``cpp`` and ``triton``
need a compiled library or a compiler, and suit some devices. ``tiled`` is PyTorch too, for ops
whose reference needs memory that grows with the square of the batch. ``auto`` takes the first of
triton, cpp, tiled and torch that can run a call: on its device, in its dtype, with its activation,
and with gradients and dropout if the call needs them. Code above the ops does not depend on which
backend ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moe_fast.ops import native
from moe_fast.ops.activations import ACTIVATIONS
from moe_fast.ops.checks import FLOAT_DTYPES, check_choice

OPS = (
    "route",
    "plan",
    "gather_rows",
    "combine_rows",
    "expert_mlp",
    "expert_mlp_norm",
    "expert_linear",
    "int8_linear",
    "int8_expert_linear",
    "int8_expert_mlp",
    "varlen_attention",
    "add_norm",
    "attention_block",
    "info_nce",
    "maxsim",
)
BACKENDS = ("triton", "cpp", "tiled", "torch")  # in the order "auto" tries them
CHOICES = ("auto", *BACKENDS)
_WORDS = {
    "triton": "Triton kernels (triton)",
    "cpp": "the compiled library (cpp)",
    "tiled": "PyTorch in tiles (tiled)",
    "torch": "PyTorch (torch)",
}

default = os.environ.get("MOE_FAST_BACKEND", "auto")  # changed by `use_backend` alone


@dataclass(frozen=True)
class Implementation:
    """One op on one backend, and what it supports.

    The activations that it supports are listed in :data:`moe_fast.ops.activations.ACTIVATIONS`.

    Attributes:
        run: the implementation, with the op's internal signature.
        unavailable: a function that returns why it cannot run on a device type (``"cpu"``,
            ``"cuda"``), or ``None`` if it can.
        unsuitable: a function that returns why it cannot run on one of the GPUs, given by index, or
            ``None`` if it can; the index ``None`` is the current GPU's.
        dtypes: the dtypes it can compute in; PyTorch runs calls with other dtypes.
        gradients, dropout: whether it supports them.
        note: a function that describes, for users, what runs on a device type; or ``None``.
    """

    run: Callable
    unavailable: Callable[[str], str | None]
    unsuitable: Callable[[int | None], str | None] = lambda index: None
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    gradients: bool = True
    dropout: bool = True
    note: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Needs:
    """What a call needs from an implementation.

    Attributes:
        device_type: the device type of its tensors.
        index: which GPU they are on; ``None``: the current one.
        dtype: the dtype to compute in; ``None`` for ops that compute nothing.
        act: the name of the activation; ``None`` for ops without one.
        gradients: whether autograd will need gradients.
        dropout: whether entries are to be dropped.
    """

    device_type: str
    dtype: torch.dtype | None = None
    act: str | None = None
    gradients: bool = False
    dropout: bool = False
    index: int | None = None


_registry: dict[tuple[str, str], Implementation] = {}


def register(
    op: str,
    backend: str,
    run: Callable,
    unavailable: Callable[[str], str | None] = lambda _: None,
    **can: Any,
) -> None:
    """Register ``run`` as ``backend``'s implementation of ``op``.

    Each file that implements an op calls this once. ``can`` holds further fields of
    :class:`Implementation`. Raises ``ValueError`` for an unknown op or backend.
    """
    check_choice("op", op, OPS)
    check_choice("backend", backend, BACKENDS)
    _registry[op, backend] = Implementation(run, unavailable, **can)


def why_unavailable(
    op: str, backend: str, device_type: str, index: int | None = None
) -> str | None:
    """Return why ``backend`` cannot run ``op`` on ``device_type``; ``None`` if it can.

    ``index`` says which GPU is meant; ``None`` the current one.
    """
    implementation = _registry.get((op, backend))
    if implementation is None:
        return "not implemented in this version"
    reason = implementation.unavailable(device_type)
    if reason is None and device_type == "cuda":
        reason = implementation.unsuitable(index)
    return reason


def _why_not(op: str, backend: str, needs: Needs) -> str | None:
    """Return why ``backend`` cannot run such a call of ``op``, or ``None``; ignores the dtype."""
    reason = why_unavailable(op, backend, needs.device_type, needs.index)
    if reason is not None:
        return reason
    can = _registry[op, backend]
    if needs.gradients and not can.gradients:
        return "it has no gradients, and some are wanted (none are under torch.no_grad())"
    if needs.dropout and not can.dropout:
        return "it has no dropout"
    kernels = None if needs.act is None else ACTIVATIONS[needs.act].kernels
    if kernels is not None and backend in ("triton", "cpp") and backend not in kernels:
        return f"it has no kernel for act={needs.act!r}"
    return None


def select(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    act: str | None = None,
    gradients: bool = False,
    dropout: bool = False,
) -> Callable:
    """Return the implementation of ``op`` to run for tensors on ``device``.

    Ops remember the answer for later calls with the same signature
    (:mod:`moe_fast.ops.checked_calls`). If a backend lacks the dtype, or if the default backend
    cannot run the call, PyTorch runs it.

    Args:
        backend: a backend's name, ``"auto"``, or ``None`` for the default (``use_backend``, else
            the environment variable ``MOE_FAST_BACKEND`` at import, else ``"auto"``).
        dtype, act, gradients, dropout: what the call needs, see :class:`Needs`.

    Raises:
        ValueError: the backend is unknown, or it was named in the call and cannot run it; the
            message says why.
    """
    if backend is not None and not isinstance(backend, str):
        check_choice("backend", backend, CHOICES)
    needs = Needs(device.type, dtype, act, gradients, dropout, device.index)
    chosen = _backend_for(op, backend, needs)
    automatic = (default if backend is None else backend) == "auto"
    if automatic and device.type == "cpu" and (op, "cpp") in _registry:
        native.warn_once()
    return _registry[op, chosen].run


def _backend_for(op: str, backend: str | None, needs: Needs) -> str:
    chosen = default if backend is None else backend
    if chosen not in CHOICES:
        check_choice("backend" if backend is not None else "MOE_FAST_BACKEND", chosen, CHOICES)
    if chosen == "auto":
        return _automatic(op, needs)
    reason = _why_not(op, chosen, needs)
    if reason is None and _computes_in(op, chosen, needs.dtype):
        return chosen
    if reason is not None and backend is not None:
        able = [b for b in BACKENDS if _why_not(op, b, needs) is None]
        raise ValueError(
            f"backend={backend!r} cannot run {op} on {needs.device_type}: {reason}. "
            f"Available here: {', '.join(able)}."
        )
    # PyTorch computes in the dtypes that the backend lacks, and runs the calls that the default
    # backend cannot run.
    return _in_pytorch(op)


def _automatic(op: str, needs: Needs) -> str:
    """Return the first backend that can run such a call of ``op``."""
    for name in BACKENDS:
        if name == "triton" and needs.device_type == "cpu":
            continue  # Triton's interpreter is for tests; it must be asked for
        if _why_not(op, name, needs) is None and _computes_in(op, name, needs.dtype):
            return name
    raise AssertionError("unreachable: the torch backend runs everywhere")


def _computes_in(op: str, backend: str, dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype in _registry[op, backend].dtypes


def default_backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that would run a call of ``op`` without gradients, if none is named."""
    return _backend_for(op, None, Needs(device.type, dtype))


def _in_pytorch(op: str) -> str:
    return "tiled" if (op, "tiled") in _registry else "torch"


def available_backends(op: str | None = None, device_type: str = "cpu") -> list[str]:
    """Return the backends that can run ``op`` (any op if ``None``) on ``device_type``."""
    if op is not None:
        check_choice("op", op, OPS)
    ops = OPS if op is None else (op,)
    return [b for b in BACKENDS if any(why_unavailable(o, b, device_type) is None for o in ops)]


def show_backends(details: bool = False) -> None:
    """Print which backends will run, one line per device.

    Args:
        details: whether to list, for every op, which backends can run it here, and why the others
            cannot.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device_type in devices:
        print(f"{device_type}: {_what_runs(device_type)}")
    if not details:
        return
    print(f"default: {default}  (use_backend(...), or MOE_FAST_BACKEND before import)")
    print(f"cpp multiplies matrices with: {native.cpu_capability or 'nothing'}")
    for device_type in devices:
        for op in OPS:
            for backend in BACKENDS:
                reason = why_unavailable(op, backend, device_type)
                state = _describe(op, backend, device_type) if reason is None else f"no: {reason}"
                print(f"{device_type:5s} {op:18s} {backend:7s} {state}")


def _what_runs(device_type: str) -> str:
    """Describe which backends run which ops by default, and what is missing, if anything."""
    chosen: dict[str, list[str]] = {}
    for op in OPS:
        backend = _backend_for(op, None, Needs(device_type))
        chosen.setdefault(backend, []).append(op)
    parts = [f"{_WORDS[name]} for {', '.join(ops)}" for name, ops in chosen.items()]
    missing = native.why_unavailable(device_type)
    return "; ".join(parts if missing is None else [*parts, missing])


def _describe(op: str, backend: str, device_type: str) -> str:
    can = _registry[op, backend]
    left = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES if d not in can.dtypes)
    state = f"available, leaves {left} to {_in_pytorch(op)}" if left else "available"
    notes = [] if can.note is None else [can.note(device_type)]
    notes += [] if can.gradients else ["no gradients"]
    notes += [] if can.dropout else ["no dropout"]
    return f"{state}: {', '.join(notes)}" if notes else state


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the ``with`` block, run ops on ``backend`` unless a call names another one.

    Calls that ``backend`` cannot run are run by PyTorch (``show_backends(details=True)`` shows what
    it can run). The setting holds for all threads of the process. Raises ``ValueError`` for an
    unknown backend.
    """
    global default
    check_choice("backend", backend, CHOICES)
    previous, default = default, backend
    try:
        yield
    finally:
        default = previous
