"""Checks of arguments that several ops share; they raise before any work starts.

Shapes, dtypes and devices are always checked, also under ``torch.compile``. Values (ids in range,
NaN logits) are checked only where reading them costs no device synchronisation: on the CPU, or on
any device if the environment variable ``MOE_FAST_CHECK=1`` was set before ``import moe_fast``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_CHECK_EVERYWHERE = os.environ.get("MOE_FAST_CHECK", "0") == "1"
INTEGER_DTYPES = (torch.int64, torch.int32)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPILED_DTYPES = FLOAT_DTYPES[1:]  # of our kernels; PyTorch computes float64


def checks_values(device: torch.device) -> bool:
    """Whether the values of tensors on ``device`` are checked (see the module's docstring)."""
    return device.type == "cpu" or _CHECK_EVERYWHERE


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of router logits, routing weights and contrastive logits.

    It is the wider one of ``dtype`` and float32.
    """
    return torch.promote_types(dtype, torch.float32)


def check_choice(name: str, given: Any, allowed: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``given`` is one of ``allowed``."""
    allowed = tuple(allowed)
    if given not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {names}; got {given!r}.")


def check_count(name: str, given: Any, at_least: int | None = 1) -> None:
    """Raise ``TypeError`` unless ``given`` is an int, ``ValueError`` if it is below ``at_least``.

    Sizes that ``torch.compile`` traces symbolically are ints too.
    """
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {given!r} ({type(given).__name__}).")
    if at_least is not None and given < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {given}.")


def check_tensor(name: str, given: Any) -> None:
    """Raise ``TypeError`` unless ``given`` is a tensor."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(given).__name__}.")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], letters: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``shape`` (``None``: any size).

    ``letters`` is the shape as the message writes it, for example ``"[E, H, D]"``. Raises
    ``TypeError`` for an object that is not a tensor.
    """
    check_tensor(name, tensor)
    given = tensor.shape
    fits = len(given) == len(shape)
    for have, want in zip(given, shape, strict=False):  # a loop: half the time of all(...)
        fits = fits and (want is None or have == want)
    if not fits:
        sizes = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape {letters} = [{sizes}]; got {list(tensor.shape)}.")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ``TypeError`` unless ``tensor.dtype`` is one of ``allowed``."""
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        given = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must have dtype {names}; got {given}.")


def check_like(
    reference_name: str, reference: Tensor, dtype: bool = True, **tensors: Tensor | None
) -> None:
    """Raise unless all ``tensors`` have the device and the dtype of ``reference``.

    Another device is a ``ValueError``, another dtype a ``TypeError``. ``dtype=False`` skips dtypes,
    and under autocast they may differ: the op casts, as PyTorch's own layers do.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {reference.device}; "
                f"got {tensor.device}."
            )
        if dtype and autocast_dtype(tensor) != autocast_dtype(reference):
            raise TypeError(
                f"{name} must have the dtype of {reference_name}, {reference.dtype} (or run under "
                f"torch.autocast); got {tensor.dtype}."
            )


def check_starts(cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """Raise ``ValueError`` unless sentence starts rise from 0 to T, if values are checked."""
    if cu_seqlens is None or not checks_values(cu_seqlens.device):
        return
    starts = cu_seqlens.tolist()
    if not starts or starts[0] != 0 or starts[-1] != num_tokens or starts != sorted(starts):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {num_tokens}; got {starts}.")


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on ``tensors``."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would multiply this tensor.

    float64 and what is no real float keep their dtype, as does everything without autocast.
    """
    device_type = tensor.device.type
    keeps = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    if keeps or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def autocast_to(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast floating tensors as autocast would for a matrix product."""
    return tuple(None if t is None else t.to(autocast_dtype(t)) for t in tensors)


def without_autocast(kernel: Callable) -> Callable:
    """Decorate ``kernel`` to run with autocast off: the caller chooses its dtypes."""

    @functools.wraps(kernel)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *args)

    return run
