"""Which implementation of an op runs: the registry that every op file adds itself to.

``torch`` is the reference and always there. ``cpp`` and ``triton`` are offered where their
compiled library or compiler is present and the tensors' device suits them; ``tiled`` is PyTorch
too, for ops whose reference needs memory that grows with the square of the batch. ``auto`` takes
the first of triton, cpp, tiled, torch that can run. Nothing above the ops knows which one ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe_fast.ops import native
from moe_fast.ops.checks import check_choice

OPS = (
    "route",
    "plan",
    "gather_rows",
    "combine_rows",
    "expert_mlp",
    "expert_mlp_norm",
    "expert_linear",
    "varlen_attention",
    "info_nce",
)
BACKENDS = ("triton", "cpp", "tiled", "torch")  # in the order "auto" tries them
_CHOICES = ("auto", *BACKENDS)
_WORDS = {
    "triton": "Triton kernels (triton)",
    "cpp": "the compiled library (cpp)",
    "tiled": "PyTorch in tiles (tiled)",
    "torch": "PyTorch (torch)",
}

_default = os.environ.get("MOE_FAST_BACKEND", "auto")


@dataclass(frozen=True)
class Implementation:
    """One op on one backend.

    Attributes:
        run: the implementation, with the op's own internal signature.
        unavailable: why it cannot run on a device type (``"cpu"``, ``"cuda"``), or ``None``.
        leaves_to_torch: compute dtypes that it hands to PyTorch: to ``tiled`` where the op has
            that, else to the reference.
        note: what runs on a device type, for people, where that needs saying.
    """

    run: Callable
    unavailable: Callable[[str], str | None]
    leaves_to_torch: tuple[torch.dtype, ...] = ()
    note: Callable[[str], str] | None = None


_registry: dict[tuple[str, str], Implementation] = {}


def register(
    op: str,
    backend: str,
    run: Callable,
    unavailable: Callable[[str], str | None] = lambda _: None,
    leaves_to_torch: tuple[torch.dtype, ...] = (),
    note: Callable[[str], str] | None = None,
) -> None:
    """Offer ``run`` as ``backend``'s implementation of ``op``. Called once per op file."""
    check_choice("op", op, OPS)
    check_choice("backend", backend, BACKENDS)
    _registry[op, backend] = Implementation(run, unavailable, leaves_to_torch, note)


def why_unavailable(op: str, backend: str, device_type: str) -> str | None:
    """The reason why ``backend`` cannot run ``op`` on ``device_type``; ``None`` if it can."""
    implementation = _registry.get((op, backend))
    if implementation is None:
        return "not implemented in this version"
    return implementation.unavailable(device_type)


def select(
    op: str, backend: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> Callable:
    """The implementation of ``op`` to run for tensors on ``device``.

    Args:
        dtype: what is computed in, for ops of which backends leave some dtypes to the reference.
        backend: a backend's name, ``"auto"``, or ``None`` for the default (``use_backend``, else
            the environment variable ``MOE_FAST_BACKEND`` at import, else ``"auto"``).

    Raises:
        ValueError: for an unknown backend, or one that cannot run here; the message says why.
    """
    chosen = _default if backend is None else backend
    if chosen not in _CHOICES:
        check_choice("backend" if backend is not None else "MOE_FAST_BACKEND", chosen, _CHOICES)
    if chosen != "auto":
        reason = why_unavailable(op, chosen, device.type)
        if reason is None:
            return _for_dtype(op, chosen, dtype)
        if backend is not None:
            offered = ", ".join(available_backends(op, device.type))
            raise ValueError(
                f"backend={backend!r} cannot run {op} on {device.type}: {reason}. "
                f"Available here: {offered}."
            )
        # A default for the whole program hands ops that it lacks to PyTorch.
        return _registry[op, _in_pytorch(op)].run
    name = _automatic(op, device.type)
    if device.type == "cpu" and name != "cpp" and (op, "cpp") in _registry:
        native.warn_once()
    return _for_dtype(op, name, dtype)


def _automatic(op: str, device_type: str) -> str:
    """The first backend that can run ``op`` there."""
    for name in BACKENDS:
        if name == "triton" and device_type == "cpu":
            continue  # Triton's interpreter: for tests, never by itself
        if why_unavailable(op, name, device_type) is None:
            return name
    raise AssertionError("unreachable: the torch backend runs everywhere")


def _by_default(op: str, device_type: str) -> str:
    """The backend that a call which names none gets."""
    if _default not in _CHOICES:
        check_choice("MOE_FAST_BACKEND", _default, _CHOICES)
    if _default == "auto":
        return _automatic(op, device_type)
    return _default if why_unavailable(op, _default, device_type) is None else _in_pytorch(op)


def _for_dtype(op: str, backend: str, dtype: torch.dtype | None) -> Callable:
    leaves = dtype in _registry[op, backend].leaves_to_torch
    return _registry[op, _in_pytorch(op) if leaves else backend].run


def _in_pytorch(op: str) -> str:
    return "tiled" if (op, "tiled") in _registry else "torch"


def available_backends(op: str | None = None, device_type: str = "cpu") -> list[str]:
    """Names of the backends that can run ``op`` (or, if ``None``, any op) on ``device_type``."""
    if op is not None:
        check_choice("op", op, OPS)
    ops = OPS if op is None else (op,)
    return [b for b in BACKENDS if any(why_unavailable(o, b, device_type) is None for o in ops)]


def show_backends(details: bool = False) -> None:
    """Print what will run: one line for each device.

    Args:
        details: then also, for every op, which backends can run it here and why the others cannot.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device_type in devices:
        print(f"{device_type}: {_what_runs(device_type)}")
    if not details:
        return
    print(f"default: {_default}  (use_backend(...), or MOE_FAST_BACKEND before import)")
    print(f"cpp multiplies matrices with: {native.cpu_capability or 'nothing'}")
    for device_type in devices:
        for op in OPS:
            for backend in BACKENDS:
                reason = why_unavailable(op, backend, device_type)
                state = _describe(op, backend, device_type) if reason is None else f"no: {reason}"
                print(f"{device_type:5s} {op:16s} {backend:7s} {state}")


def _what_runs(device_type: str) -> str:
    """The backends that calls get by default, each with its ops; what is missing, if anything."""
    chosen: dict[str, list[str]] = {}
    for op in OPS:
        chosen.setdefault(_by_default(op, device_type), []).append(op)
    parts = [f"{_WORDS[name]} for {', '.join(ops)}" for name, ops in chosen.items()]
    missing = native.why_unavailable(device_type)
    return "; ".join(parts if missing is None else [*parts, missing])


def _describe(op: str, backend: str, device_type: str) -> str:
    implementation = _registry[op, backend]
    names = ", ".join(str(d).removeprefix("torch.") for d in implementation.leaves_to_torch)
    state = f"available, leaves {names} to {_in_pytorch(op)}" if names else "available"
    return f"{state}: {implementation.note(device_type)}" if implementation.note else state


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the ``with`` block, run ops on ``backend`` unless a call names another.

    Ops that ``backend`` does not implement on the tensors' device run in PyTorch
    (``show_backends(details=True)`` lists them). The setting is the process's, not the thread's.
    """
    global _default
    check_choice("backend", backend, _CHOICES)
    previous, _default = _default, backend
    try:
        yield
    finally:
        _default = previous
