"""Turns texts into vectors with any model that has ``encode``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.lengths import measure_texts, shortened
from moe_fast.encoding.options import EncodeOptions, Role
from moe_fast.encoding.prompts import prompt_of
from moe_fast.extras import require

_SHOWN = 60


def encode_texts(
    model: Any,
    texts: Sequence[str],
    *,
    role: Role | None = None,
    truncate: bool | None = None,
    dtype: str | None = None,
    tokens: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """Compute one vector per text, as the model returns them.

    Args:
        model: any object with ``encode(texts, **options)`` that returns [N, d], an array, a tensor
            or a SciPy sparse matrix.
        texts: N texts.
        role: call ``encode_query`` or ``encode_document`` instead.
        truncate: whether texts longer than the model's ``max_seq_length`` are cut. Otherwise such
            a text is an error (``None``: the ``truncate`` of a `MoESentenceTransformer` decides).
        dtype: the dtype of the result; ``None``: the model's, but float32 for bfloat16.
        tokens: the texts as the ``tokenize_ahead`` of a `MoESentenceTransformer` gives them.
        **options: passed to the model, such as ``domain``, ``prompt_name`` and ``batch_size``.

    Returns:
        [N, d], an array or a sparse matrix; all numbers are finite.

    Raises:
        ValueError: texts are too long and must not be cut; the model does not return one vector
            per text, or numbers are not finite (in ``dtype``); the model lacks the role's method.
        TypeError: the model has several encoders.
    """
    check_one_encoder(model)
    encode = _method(model, role)
    given = list(texts if tokens is None else tokens)
    if hasattr(model, "truncate"):  # a MoESentenceTransformer measures the texts itself
        options |= {} if truncate is None else {"truncate": truncate}
    else:
        prompt = prompt_of(model, options.get("prompt"), options.get("prompt_name"), role)
        given = _fitting(model, given, prompt, truncate)
    vectors = _to_array(encode(given, **options))
    if vectors.ndim != 2 or vectors.shape[0] != len(given):
        raise ValueError(
            f"model.encode must give one vector per text, [{len(given)}, d]; got shape "
            f"{tuple(vectors.shape)}"
        )
    vectors = vectors if dtype is None else vectors.astype(dtype)
    _check_finite(vectors, texts)
    return vectors


def embed(
    model: Any,
    texts: Sequence[str],
    role: Role,
    *,
    domains: Sequence[str] | None = None,
    options: EncodeOptions | None = None,
) -> Any:
    """Compute unit vectors of texts; repeated texts of a domain are encoded once.

    Args:
        model: as in `encode_texts`.
        texts: N texts.
        role: which of the prompts to use.
        domains: one name per text, passed to ``encode``; ``None``: no domain is passed.
        options: see `EncodeOptions`; ``encode_query`` and ``encode_document`` are called only if
            ``roles`` is true.

    Returns:
        [N, d] float64, dense or sparse; a zero vector stays zero.

    Raises:
        ValueError, TypeError: as `encode_texts`.
        ImportError: scikit-learn is not installed.
    """
    normalize = require("sklearn.preprocessing", "eval", "embed").normalize
    options = options or EncodeOptions()
    names: Sequence[str | None] = [None] * len(texts) if domains is None else domains
    keys = list(zip(texts, names, strict=True))
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    keywords = options.for_role(role)
    if domains is not None:
        keywords["domain"] = [domain for _, domain in places]
    vectors = encode_texts(
        model,
        [text for text, _ in places],
        role=role if options.roles else None,
        truncate=options.truncate,
        **keywords,
    )
    return normalize(vectors.astype(np.float64))[[places[key] for key in keys]]


def _method(model: Any, role: Role | None) -> Any:
    name = "encode" if role is None else f"encode_{role}"
    if not hasattr(model, name):
        raise ValueError(f"roles=True needs a model with {name}; got {type(model).__name__}")
    return getattr(model, name)


def _fitting(model: Any, texts: list[str], prompt: str, truncate: bool | None) -> list[str]:
    """Check the lengths of texts for a stock ``SentenceTransformer``, which cuts them silently."""
    limit, tokenizer = getattr(model, "max_seq_length", None), getattr(model, "tokenizer", None)
    long = measure_texts(tokenizer, texts, prompt, limit)
    long.settle(truncate)
    return shortened(texts, prompt, long)


def _to_array(vectors: Any) -> Any:
    if hasattr(vectors, "detach"):  # a tensor; bfloat16 has no NumPy form
        return vectors.detach().float().cpu().numpy()
    return vectors if hasattr(vectors, "toarray") else np.asarray(vectors)


def _check_finite(vectors: Any, texts: Sequence[str]) -> None:
    sparse = hasattr(vectors, "toarray")
    finite = np.isfinite(vectors.data if sparse else vectors)
    if finite.all():
        return
    row = vectors.tocoo().row[~finite][0] if sparse else np.flatnonzero(~finite.all(axis=1))[0]
    raise ValueError(
        f"the model gives NaN or infinite numbers (as {vectors.dtype}) for text {row}, "
        f"{texts[row][:_SHOWN]!r}"
    )
