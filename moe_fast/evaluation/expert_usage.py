"""Counts how many tokens of each domain are routed to each expert."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moe_fast.layers import MoERouter


def expert_usage(
    model: Any,
    texts: Sequence[str],
    domains: Sequence[str],
    *,
    order: Sequence[str] | None = None,
    pass_domain: bool = False,
    **encode_options: Any,
) -> NDArray[np.float64]:
    """Return the share of each domain's tokens that each expert received, layer by layer.

    Args:
        model: a ``SentenceTransformer`` with MoE layers (anything that has ``encode`` and holds
            `MoERouter` modules).
        texts: the texts to encode.
        domains: one name per text.
        order: the domains of the result, in this order; by default all, in order of first
            appearance.
        pass_domain: give each text's domain to ``encode``, as enforced routing requires.
        **encode_options: arguments of ``encode``, such as ``truncate=True`` or ``batch_size=64``.

    Returns:
        [domain, layer, expert] float64, which sums to 1 over the experts. With several experts per
        token, each of them counts. Padding is not counted.

    Raises:
        ValueError: there are no texts, or `texts` and `domains` have different lengths.
        ValueError: a domain in `order` has no texts.
        ValueError: the model has no MoE layers.
    """
    names = list(order) if order is not None else list(dict.fromkeys(domains))
    if len(texts) != len(domains) or not texts:
        raise ValueError(
            "texts and domains must have the same length, at least 1; got "
            f"{len(texts)} texts, {len(domains)} domains"
        )
    if without := sorted(set(names) - set(domains)):
        raise ValueError(f"order: no texts of {without}; domains present: {sorted(set(domains))}")
    rows = []
    for name in names:
        chosen = [text for text, domain in zip(texts, domains, strict=True) if domain == name]
        with _counted_tokens(model) as counts:
            domain = {"domain": name} if pass_domain else {}
            model.encode(chosen, **domain, **encode_options)
        rows.append(counts)
    totals = np.stack(rows)
    return totals / totals.sum(axis=-1, keepdims=True)


@contextmanager
def _counted_tokens(model: nn.Module) -> Iterator[NDArray[np.float64]]:
    """Count the tokens [layer, expert] of this thread's forward passes inside the block.

    The array that the block gets is updated with every forward pass.
    """
    routers = [module for module in model.modules() if isinstance(module, MoERouter)]
    if not routers:
        raise ValueError("model has no MoE layers; moe_fast.upcycle gives it some")
    num_experts = max(router.num_experts for router in routers)
    counts = np.zeros((len(routers), num_experts))
    handles = []
    this_thread = threading.get_ident()
    for layer, router in enumerate(routers):

        def count(_module: nn.Module, _inputs: Any, output: Any, layer: int = layer) -> None:
            if threading.get_ident() != this_thread:
                return
            tokens = output.tokens_per_expert.detach().cpu().numpy()
            counts[layer, : len(tokens)] += tokens

        handles.append(router.register_forward_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
