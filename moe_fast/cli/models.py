"""Models in and out of the commands that convert them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_fast.cli.command import Run

_ALL = "all texts"


def save_converted(model: Any, output: Path, source: str, run: Run) -> None:
    """Save a model, a bare encoder's tokenizer and the run's settings, all at once.

    Args:
        source: the model that `model` was made of.
    """
    from moe_fast.files import atomic_folder
    from moe_fast.models.loading import tokenizer_beside

    with atomic_folder(output, replaces=("*",)) as temporary:
        model.save_pretrained(str(temporary))
        tokenizer = None if hasattr(model, "encode") else tokenizer_beside(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        run.save_settings(temporary)


def in_model_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names of domains, each once: those the model knows in its order, then the others sorted."""
    found = set(names)
    return [name for name in known if name in found] + sorted(found - set(known))


def usage_by_domain(
    model: Any, texts: Sequence[str], domains: Sequence[str], **options: Any
) -> tuple[list[str], NDArray]:
    """Names of the domains, and the shares [domain, layer, expert] of their texts' tokens.

    Args:
        domains: one per text, or none: then all texts are one.
        options: of `moe_fast.evaluation.expert_usage`.
    """
    from moe_fast.evaluation import expert_usage

    known = model.transformers_model.config.domains
    names = in_model_order(domains or [_ALL], known)
    pass_domain = bool(domains and known)
    options |= {"order": names, "pass_domain": pass_domain, "show_progress_bar": False}
    return names, expert_usage(model, texts, list(domains) or names * len(texts), **options)


def describe_size(model: Any) -> str:
    """Parameters, and those that one token visits where they are fewer."""
    encoder = getattr(model, "transformers_model", model)
    total = sum(parameter.numel() for parameter in model.parameters())
    if not hasattr(encoder, "moe_mlps"):
        return f"{total:,} parameters"
    idle = encoder.num_parameters() - encoder.num_parameters(only_active=True)
    return f"{total:,} parameters, {total - idle:,} active per token"


def describe_model(model: Any, name: str) -> dict[str, Any]:
    """What a model is: layers, experts, parameters, routing, domains; ready for JSON.

    Args:
        model: a bare encoder or a SentenceTransformer, dense or mixture.
        name: as the user gave it.
    """
    encoder = getattr(model, "transformers_model", model)
    config = encoder.config
    shown: dict[str, Any] = {
        "model": name,
        "class": type(model).__name__,
        "encoder": f"{type(encoder).__name__} ({config.model_type})",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if hasattr(model, "encode"):
        shown["tokens per text"] = model.max_seq_length
        shown["embedding size"] = model.get_embedding_dimension()
        shown["prompts"] = [f"{key}: {text!r}" for key, text in model.prompts.items() if text]
    if not hasattr(encoder, "moe_mlps"):
        return shown | {"experts": "none, the model is dense"}
    idle = encoder.num_parameters() - encoder.num_parameters(only_active=True)
    return shown | {
        "active parameters": shown["parameters"] - idle,
        "experts": config.num_experts,
        "experts per token": config.num_experts_per_tok,
        "routing": config.routing,
        "weights": config.weight_mode,
        "replicated": config.target,
        "layers with experts": list(config.moe_layers),
        "domains": list(config.domains),
        "default domain": config.default_domain or "none",
        "domain tokens": "yes" if config.domain_token_ids else "no",
        "made from": config.upcycled_from or "unknown",
        "made by": f"moe_fast {config.moe_fast_version}",
    }
