"""Cosines of texts: pairs row by row, and all with all."""

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
    """Unit vectors of the columns ``a`` (as queries) and ``b`` (as documents), row by row.

    Returns:
        (a [N, d], b [N, d], the settings of the encoding, ready for JSON).
    """
    options = options or EncodeOptions()
    pass_domain = passes_domain(model, options, "domain" in columns)
    domains = columns["domain"] if pass_domain else None
    a = embed(model, columns["a"], "query", domains=domains, options=options)
    b = embed(model, columns["b"], "document", domains=domains, options=options)
    return a, b, {"encode": asdict(options) | {"pass_domain": pass_domain}}


def pairwise_cosine(a: Any, b: Any) -> NDArray[np.float64]:
    """Row by row, of unit vectors [N, d], dense or sparse -> [N] float64, see `all_cosines`."""
    if hasattr(a, "multiply"):
        return np.round(np.asarray(a.multiply(b).sum(axis=1)).ravel(), _DECIMALS)
    return np.round(np.einsum("nd,nd->n", a, b), _DECIMALS)


def all_cosines(a: Any, b: Any) -> NDArray[np.float64]:
    """Of unit vectors [N, d] and [M, d], dense or sparse -> [N, M] float64.

    Rounded to 12 decimals, or the order of summation would decide between equal cosines.
    """
    product = a @ b.T
    dense = product.toarray() if hasattr(product, "toarray") else product
    return np.round(dense, _DECIMALS)
