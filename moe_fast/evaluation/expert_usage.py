"""Counts which experts the tokens of each domain go to."""

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
    """Returns the share of each domain's real tokens that each expert got, layer by layer.

    Args:
        model: a ``SentenceTransformer`` with MoE layers (anything that has ``encode`` and holds
            `MoERouter` modules).
        texts: what to encode.
        domains: one name per text.
        order: the domains in the order wanted; by default in order of first appearance.
        pass_domain: hand each text's domain to ``encode``, as enforced routing wants it.
        **encode_options: go to ``encode``, e.g. ``truncate=True`` or ``batch_size=64``.

    Returns:
        [domain, layer, expert] float64; sums to 1 over experts. With several experts per token each
        of them counts. Padding counts nowhere.

    Raises:
        ValueError: lengths that differ, no texts, a domain in `order` without texts, or a model
            without MoE layers.
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
    """An array [layer, expert] that grows with this thread's forward passes inside the block."""
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
