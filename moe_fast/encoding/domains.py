"""The domains of texts, and calls of ``encode`` with texts of several domains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import torch

from moe_fast.models.configuration import AUTO


def domains_of(model: Any) -> list[str]:
    """The domains of the model's encoder, which chooses experts or adds tokens by domain."""
    config = getattr(getattr(model, "transformers_model", None), "config", None)
    return list(getattr(config, "domains", None) or ())


def asks_for_prediction(domain: Any) -> bool:
    """Whether ``domain``, one name or a list of them, is or contains "auto"."""
    return domain == AUTO or (isinstance(domain, list) and AUTO in domain)


def checked_domain(
    config: Any, domain: Any, num_texts: int, *, auto: bool = False
) -> str | list[str] | None:
    """``domain`` as one name, a list with one name per text, or ``None``.

    Args:
        config: the mixture's.
        domain: what the caller gave.
        num_texts: the number of texts.
        auto: whether "auto" may stand for a name.

    Raises:
        ValueError: for an unknown domain, for no domain if one is needed, and if the number of
            names is not that of the texts.
        TypeError: for anything but a name or a sequence of names.
    """
    if domain is None:
        if config.routing == "enforced" and config.default_domain is None:
            raise ValueError(
                "domain must be given: the model routes by domain and has no default_domain. "
                f"Known domains: {', '.join(config.domains) or 'none'}; got None."
            )
        return AUTO if auto and config.default_domain == AUTO else None
    if isinstance(domain, str):
        if not (auto and domain == AUTO):
            config.domain_id(domain)
        return domain
    names = None if isinstance(domain, (Mapping, Set, bytes)) else _as_list(domain)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"domain must be a name (str) or a sequence of names, one per text; got {domain!r}."
        )
    if len(names) != num_texts:
        raise ValueError(
            f"domain must be one name or one per text; got {len(names)} names for "
            f"{num_texts} texts."
        )
    for name in dict.fromkeys(names):
        if not (auto and name == AUTO):
            config.domain_id(name)
    return names


def encode_by_domain(
    encode: Callable[..., Any], texts: list[Any], domains: list[str], options: dict[str, Any]
) -> Any:
    """Call ``encode`` once per domain, and return the results in the order of the texts.

    Args:
        encode: ``SentenceTransformer.encode`` of the model.
        texts, domains: N texts, at least one, and the domain of each.
        options: the keywords of ``encode`` other than ``domain``.
    """
    precision = options.get("precision") or "float32"
    if precision != "float32":  # quantisation needs the ranges over all texts, not one domain's
        from sentence_transformers.util import quantize_embeddings

        exact = options | {"precision": "float32"}
        vectors = encode_by_domain(encode, texts, domains, exact)
        codes = quantize_embeddings(vectors, precision=precision)
        if isinstance(vectors, np.ndarray):
            return codes
        codes = torch.as_tensor(codes)
        return codes if isinstance(vectors, torch.Tensor) else list(codes)
    places: list[int] = []
    parts = []
    for name in sorted(set(domains)):
        here = [i for i, d in enumerate(domains) if d == name]
        places += here
        parts.append(encode([texts[i] for i in here], domain=name, **options))
    order = np.argsort(places)
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)[order]
    flat = [item for part in parts for item in part]
    return [flat[i] for i in order]


def _as_list(values: Any) -> list[Any] | None:
    """``values`` as a list; ``None`` if they are not iterable."""
    try:
        return list(values)
    except TypeError:
        return None
