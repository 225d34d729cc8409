"""The contrastive loss in ``bench/gpu.py``: errors against float64, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops

from .gpu_checks import check_equal, no_waiting
from .gpu_times import Ceilings, Settings
from .problem import BOUNDS, covering, relative_error

# B = 11,300 is more than one rectangle of logits in every dtype.
GRID = dict(
    batch=(2, 63, 1000, 4099, 11_300),
    dim=(1, 64, 389, 768, 1536),
    per_row=(0, 1),
    dtype=tuple(BOUNDS),
    symmetric=(True, False),
    similarity=("cosine", "dot"),
    texts=(False, True),
    groups=(False, True),
    label_smoothing=(0.0, 0.1),
)
DRY_GRID = {
    **GRID,
    "batch": (2, 37),
    "dim": (13, 16),
    "dtype": (torch.float32, torch.bfloat16),
}
# The targets on an H200, at B = 65,536, d = 768, bfloat16, symmetric.
TARGET_SECONDS, TARGET_BYTES = 0.052, 1e9
# The gradient of the logits is rounded before its products: two more roundings than in a product.
_SLACK = 2
# Cases of the grid whose kernels are compiled beforehand.
_AHEAD = 24


def inputs_of(
    batch: int, dim: int, per_row: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Make pairs that are similar, as in training, and a scale."""
    a = torch.randn(batch, dim, device=device)
    tensors = {"a": a, "b": a + torch.randn(batch, dim, device=device)}
    if per_row:
        tensors["negatives"] = torch.randn(batch * per_row, dim, device=device)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return {**tensors, "scale": torch.tensor(20.0, device=device)}


def results(
    inputs: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the loss and the gradient of every tensor, by name."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in inputs.items()}
    loss: Any = ops.info_nce(**leaves, **options, backend=backend)  # type: ignore[arg-type]
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def check(settings: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Return the errors of the loss and of every gradient, each divided by its bound."""
    inputs, options = _problem(settings, device)
    dtype = settings["dtype"]
    expected = results(inputs, "tiled", torch.float64, **options)
    actual = results(inputs, "triton", **options)
    exact = BOUNDS[torch.float32]
    bounds = {n: _SLACK * (exact if n in ("loss", "scale") else BOUNDS[dtype]) for n in expected}
    # Cosines in one dimension are 1 or -1: their gradients are 0, up to rounding.
    vanish = inputs["a"].shape[1] == 1 and settings["similarity"] == "cosine"
    shown = ("loss", "scale") if vanish else tuple(expected)
    return {n: relative_error(actual[n], expected[n]) / bounds[n] for n in shown}


def _problem(
    settings: dict[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make the tensors of a case, and the other arguments of the loss."""
    s = dict(settings)
    batch, per_row, dtype = s.pop("batch"), s.pop("per_row"), s.pop("dtype")
    torch.manual_seed(0)
    inputs = inputs_of(batch, s.pop("dim"), per_row, dtype, device)
    if s["similarity"] == "dot":
        inputs["scale"] = torch.tensor(0.1, device=device)
    if s.pop("texts"):
        s["row_ids"] = torch.randint(2 * batch, (batch,), device=device)
        s["col_ids"] = torch.randint(2 * batch, (batch * (1 + per_row),), device=device)
    groups = torch.randint(batch, (batch,), device=device)
    s["group_ids"] = groups if s.pop("groups") else None
    return inputs, s


def _large(device: torch.device, dry: bool) -> dict[str, Tensor]:
    batch, dim = (70, 16) if dry else (65_536, 768)
    torch.manual_seed(0)
    return inputs_of(batch, dim, 0, torch.bfloat16, device)


def check_repeats(device: torch.device, dry: bool) -> str:
    """Check that two runs agree to the last bit, and that the second does not wait for the GPU."""
    inputs = _large(device, dry)
    first = results(inputs, "triton")
    with nullcontext() if dry else no_waiting():
        second = results(inputs, "triton")
    check_equal(second, first, "a second run")
    return "bitwise equal"


def times(settings: Settings, ceilings: Ceilings) -> dict[str, Any]:
    """Time forward and backward at B = 65,536, d = 768, bfloat16, symmetric.

    Returns:
        Seconds and peak bytes, including the inputs, of ours and of the tiled form in PyTorch; the
        floor, four products; and whether the targets are met.
    """
    inputs = _large(settings.device, settings.dry)
    batch, dim = inputs["a"].shape
    found: dict[str, Any] = {"floor": 4 * 2 * batch**2 * dim / ceilings.flops}
    for backend in ("triton", "tiled"):
        run = partial(results, inputs, backend)
        seconds, peak = settings.seconds(run), None
        if not settings.dry:  # on the CPU nothing counts allocated memory
            torch.cuda.reset_peak_memory_stats()
            run()
            peak = torch.cuda.max_memory_allocated()
        found[backend] = {"seconds": seconds, "bytes": peak}
    ours = found["triton"]
    found["target"] = {"seconds": TARGET_SECONDS, "bytes": TARGET_BYTES}
    if not settings.dry:
        found["met"] = ours["seconds"] <= TARGET_SECONDS and ours["bytes"] <= TARGET_BYTES
    return found


def items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches of the part ``info_nce``: the large batch, and the first cases of the grid."""
    yield "large", lambda: results(_large(device, dry=False), "triton")
    for number, settings in enumerate(covering(GRID)[:_AHEAD]):
        yield f"case {number}", partial(launch, settings, device)


def launch(settings: dict[str, Any], device: torch.device) -> None:
    """Launch forward and backward of a case of :data:`GRID`, without a comparison."""
    inputs, options = _problem(settings, device)
    results(inputs, "triton", **options)
