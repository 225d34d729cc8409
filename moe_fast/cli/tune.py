"""``moe-fast tune``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import Device, ModelArgument

EXAMPLE = "moe-fast tune mixture --tokens 65536"


def run_command(
    model: ModelArgument,
    *,
    tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens of a typical batch, without padding.")
    ] = 65_536,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="Type of the numbers that the model computes with, autocast included."),
    ] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=1, help="Approximate time of the search.")] = 120.0,
    device: Device = None,
    run: Run,
) -> None:
    """Search tile sizes of the Triton kernels for a mixture on this GPU, for later runs to use.

    They are written to the GPU's table, in the folder MOE_FAST_TUNING if that is set.
    """
    import torch

    from moe_fast.ops.tuning import tune

    mlp = _first_mixture(model)
    if mlp.expert_form != "full" or type(mlp).__name__ != "MoEMLP":
        raise ValueError(
            "MODEL must have experts in place of whole MLPs, with weights of their own; it has "
            f"{type(mlp).__name__} with expert_form={mlp.expert_form!r}"
        )
    tuned = tune(
        mlp.hidden_size,
        mlp.intermediate_size,
        mlp.num_experts,
        mlp.num_experts_per_tok,
        tokens=tokens,
        dtype=getattr(torch, dtype),
        gated=mlp.gated,
        target=mlp.target,
        seconds=seconds,
        device=device,
    )
    for key, choice in tuned.choices.items():
        print(f"{choice.product:12s} {key}: {_describe(choice)}")
    layers = ", ".join(f"{name} {ms:.3f} ms" for name, ms in tuned.layer_ms.items())
    print(f"whole mixture, forward + backward: {layers}; kept: {tuned.kept}")
    run.say(f"{tuned.path}: {len(tuned.choices)} entries written")


def _first_mixture(model: str) -> Any:
    """Load a model and return its first MoE MLP; all of its MoE layers have the same sizes.

    Raises:
        ValueError: the model is dense.
    """
    from moe_fast.encoding.loading import load_as_saved

    loaded = load_as_saved(model)
    encoder = getattr(loaded, "transformers_model", loaded)
    mlps = encoder.moe_mlps() if hasattr(encoder, "moe_mlps") else {}
    if not mlps:
        raise ValueError(f"MODEL must have experts; {model} is dense")
    return next(iter(mlps.values()))


def _describe(choice: Any) -> str:
    """List the changed settings, with the times before and after."""
    before, after = vars(choice.before), vars(choice.after)
    changed = [f"{n} {before[n]} -> {after[n]}" for n in after if after[n] != before[n]]
    times = f"{choice.before_ms:.3f} -> {choice.after_ms:.3f} ms" if changed else "unchanged"
    return ", ".join([times, *changed, f"{choice.tried} tried"])
