"""Saves and describes models for the commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_fast.cli.command import Run

_ALL = "all texts"


def save_converted(model: Any, output: Path, source: str, run: Run) -> None:
    """Save a model, the tokenizer of a bare encoder and the run's settings, in one step.

    Args:
        model: the model to save.
        output: the folder to write.
        source: the model that `model` was made from, which has the tokenizer.
        run: the run of the command.
    """
    from moe_fast.files import atomic_folder
    from moe_fast.models.loading import tokenizer_beside

    with atomic_folder(output, replaces=("*",)) as temporary:
        model.save_pretrained(str(temporary))
        bare = not hasattr(model, "transformers_model")  # sentence-transformers saves its own
        tokenizer = tokenizer_beside(source) if bare else None
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        run.save_settings(temporary)


def in_model_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Sort names of domains: those the model knows in its order, then the others by name."""
    found = set(names)
    return [name for name in known if name in found] + sorted(found - set(known))


def usage_by_domain(
    model: Any, texts: Sequence[str], domains: Sequence[str], **options: Any
) -> tuple[list[str], NDArray]:
    """Compute the share of each domain's tokens that each expert received.

    Args:
        model: a mixture.
        texts: the texts to encode.
        domains: one domain per text; if empty, all texts count as one domain.
        options: further arguments of `moe_fast.evaluation.expert_usage`.

    Returns:
        (names of the domains, shares [domain, layer, expert]).
    """
    from moe_fast.evaluation import expert_usage

    known = model.transformers_model.config.domains
    names = in_model_order(domains or [_ALL], known)
    pass_domain = bool(domains and known)
    options |= {"order": names, "pass_domain": pass_domain, "show_progress_bar": False}
    return names, expert_usage(model, texts, list(domains) or names * len(texts), **options)


def describe_size(model: Any) -> str:
    """Return the number of parameters, and for a mixture also those that one token uses."""
    encoder = getattr(model, "transformers_model", model)
    total = sum(parameter.numel() for parameter in model.parameters())
    if not hasattr(encoder, "moe_mlps"):
        return f"{total:,} parameters"
    # The integers of a quantised encoder are no parameters of PyTorch's.
    total += encoder.num_parameters() - sum(p.numel() for p in encoder.parameters())
    idle = encoder.num_parameters() - encoder.num_parameters(only_active=True)
    return f"{total:,} parameters, {total - idle:,} active per token"


def describe_model(model: Any, name: str) -> dict[str, Any]:
    """Describe a model's layers, experts, parameters, routing and domains, as JSON can hold it.

    Args:
        model: a bare encoder or a SentenceTransformer, dense or mixture.
        name: the model's name or path as the user gave it.
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
        shown["modules"] = [type(module).__name__ for module in model]
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
        "form of the experts": describe_form(config),
        "layers with experts": list(config.moe_layers),
        "domains": list(config.domains),
        "default domain": config.default_domain or "none",
        "domain predictor": _describe_predictor(config.domain_predictor),
        "domain tokens": "yes" if config.domain_token_ids else "no",
        "made from": config.upcycled_from or "unknown",
        "made by": f"moe_fast {config.moe_fast_version}",
    }


def describe_form(config: Any) -> str:
    """Describe what an expert is, as ``inspect`` shows it."""
    if config.moe_block == "multi_head":
        return f"multi-head block, {config.moe_heads} heads per token, each routed apart"
    if config.expert_form == "full":
        return "weights of their own"
    rank, alpha = config.lora_rank, config.lora_alpha
    return f"LoRA on one shared MLP, rank {rank}, alpha {alpha:g}"


def _describe_predictor(fitted: dict[str, Any] | None) -> str:
    """Describe a domain predictor by what the configuration says of it."""
    if fitted is None:
        return "none"
    accuracy = fitted.get("accuracy")
    said = f"of {len(fitted['domains'])} domains, fitted to {fitted['num_texts']:,} texts"
    return said if accuracy is None else f"{said}, accuracy {accuracy:.3f} in cross-validation"
