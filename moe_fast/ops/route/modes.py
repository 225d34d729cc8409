"""Names of the routing modes, and which of them can be combined."""

from __future__ import annotations

from moe_fast.ops.checks import check_choice, check_count

MODES = ("token_topk", "sentence_topk", "sentence_switch", "enforced", "dense")
CHOOSING_MODES = ("token_topk", "sentence_topk", "sentence_switch")
SENTENCE_MODES = ("sentence_topk", "sentence_switch")
WEIGHT_MODES = ("auto", "renormalize", "probability", "straight_through", "one")


def resolve_weight_mode(
    mode: str, weight_mode: str, num_experts_per_tok: int, mode_name: str = "mode"
) -> str:
    """Return the concrete weight mode for ``"auto"``; check that mode and weight mode fit.

    Args:
        mode_name: the name of the caller's argument, for the messages.

    Raises:
        ValueError: a name is unknown, or ``mode`` does not allow the weight mode.
    """
    check_choice(mode_name, mode, MODES)
    check_choice("weight_mode", weight_mode, WEIGHT_MODES)
    if mode == "enforced":
        check_choice(f"weight_mode with {mode_name}='enforced'", weight_mode, ("auto", "one"))
        return "one"
    if mode == "dense":
        allowed = ("auto", "probability")
        check_choice(f"weight_mode with {mode_name}='dense'", weight_mode, allowed)
        return "probability"
    if weight_mode == "auto":
        return "straight_through" if num_experts_per_tok == 1 else "renormalize"
    return weight_mode


def check_experts_per_tok(
    mode: str, num_experts_per_tok: int, num_experts: int, mode_name: str = "mode"
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless E, K and ``mode`` fit together."""
    check_count("num_experts", num_experts)
    check_count("num_experts_per_tok", num_experts_per_tok, at_least=None)
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(
            f"num_experts_per_tok must lie in 1 .. num_experts = {num_experts}; "
            f"got {num_experts_per_tok}."
        )
    if mode in ("enforced", "sentence_switch") and num_experts_per_tok != 1:
        raise ValueError(
            f"num_experts_per_tok must be 1 with {mode_name}={mode!r}; got {num_experts_per_tok}."
        )
