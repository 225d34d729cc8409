"""Computes the cosines of pairs of texts, row by row or of all combinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.encoding.options import EncodeOptions, passes_domain
from moe_fast.encoding.vectors import embed

_DECIMALS = 12


def embed_pairs(
    model: Any, columns: Mapping[str, Sequence[Any]], options: EncodeOptions | None
) -> tuple[Any, Any, dict[str, Any]]:
    """Encode the columns ``a`` (as queries) and ``b`` (as documents) to unit vectors.

    Returns:
        (vectors of a [N, d], vectors of b [N, d], the settings of the encoding as JSON can hold).
    """
    options = options or EncodeOptions()
    pass_domain = passes_domain(model, options, "domain" in columns)
    domains = columns["domain"] if pass_domain else None
    a = embed(model, columns["a"], "query", domains=domains, options=options)
    b = embed(model, columns["b"], "document", domains=domains, options=options)
    return a, b, {"encode": asdict(options) | {"pass_domain": pass_domain}}


def pairwise_cosine(a: Any, b: Any) -> NDArray[np.float64]:
    """Compute the cosine of each row of `a` with the same row of `b`.

    Args:
        a, b: unit vectors [N, d], dense or sparse.

    Returns:
        [N] float64, rounded as in `all_cosines`.
    """
    if hasattr(a, "multiply"):
        return np.round(np.asarray(a.multiply(b).sum(axis=1)).ravel(), _DECIMALS)
    return np.round(np.einsum("nd,nd->n", a, b), _DECIMALS)


def all_cosines(a: Any, b: Any) -> NDArray[np.float64]:
    """Compute the cosines of all rows of `a` with all rows of `b`.

    Args:
        a, b: unit vectors [N, d] and [M, d], dense or sparse.

    Returns:
        [N, M] float64, rounded to 12 decimals, so that cosines that differ only by the order of
        summation are equal.
    """
    product = a @ b.T
    dense = product.toarray() if hasattr(product, "toarray") else product
    return np.round(dense, _DECIMALS)
