"""Texts to unit vectors, with any model that has ``encode``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.lengths import measure_texts, shortened
from moe_fast.encoding.prompts import prompt_of
from moe_fast.evaluation.optional import require

Role = Literal["query", "document"]
_DECIMALS = 12


@dataclass(frozen=True)
class EncodeOptions:
    """How a model's ``encode`` is called. What is ``None`` is left to the model.

    Attributes:
        batch_size: texts per batch.
        truncate: whether texts longer than the model's ``max_seq_length`` are cut. Otherwise such
            a text is an error (``None``: as a `MoESentenceTransformer`'s own ``truncate`` says).
        query_prompt, document_prompt: texts put in front of every query (``a``) and every
            document (``b``).
        query_prompt_name, document_prompt_name: names of the model's own prompts instead.
        roles: call ``encode_query`` and ``encode_document``, which choose the model's own prompts
            for the two. ``None``: for retrieval, where the model has them; not for pairs and STS.
        domain: one domain for all texts, handed to the model.
        pass_domain: hand each text's own domain to the model. ``None``: where the model knows
            domains, the data names them, and ``domain`` is not given.
        show_progress_bar: as in sentence-transformers.
    """

    batch_size: int | None = None
    truncate: bool | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_prompt_name: str | None = None
    document_prompt_name: str | None = None
    roles: bool | None = None
    domain: str | None = None
    pass_domain: bool | None = None
    show_progress_bar: bool | None = None

    def __post_init__(self) -> None:
        for role in ("query", "document"):
            if getattr(self, f"{role}_prompt") and getattr(self, f"{role}_prompt_name"):
                raise ValueError(f"give {role}_prompt or {role}_prompt_name, not both")
        if self.domain is not None and self.pass_domain:
            raise ValueError(
                "give domain (one for all texts) or pass_domain (each its own), not both"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")

    def for_role(self, role: Role) -> dict[str, Any]:
        """Keywords of ``encode`` for the texts of one role."""
        options = {
            "batch_size": self.batch_size,
            "show_progress_bar": self.show_progress_bar,
            "domain": self.domain,
            "prompt": getattr(self, f"{role}_prompt"),
            "prompt_name": getattr(self, f"{role}_prompt_name"),
        }
        return {name: value for name, value in options.items() if value is not None}


def wants_domains(model: Any) -> bool:
    """Whether its encoder knows domains: experts chosen by domain, or tokens of domains."""
    config = getattr(getattr(model, "transformers_model", None), "config", None)
    return bool(getattr(config, "domains", None))


def embed(
    model: Any,
    texts: Sequence[str],
    role: Role,
    *,
    domains: Sequence[str] | None = None,
    options: EncodeOptions | None = None,
) -> Any:
    """Unit vectors of texts, each different text (of a domain) encoded once.

    Args:
        model: anything with ``encode(texts, **keywords)`` that gives [N, d], an array, a tensor or
            a SciPy sparse matrix.
        texts: N texts.
        role: which of the prompts to use.
        domains: one name per text, handed to ``encode``; ``None``: nothing is.
        options: see `EncodeOptions`; ``roles`` must be true for ``encode_query`` and
            ``encode_document`` to be called.

    Returns:
        [N, d] float64, dense or sparse; a zero vector stays zero.

    Raises:
        ValueError: texts that are too long, where they are not to be cut; vectors that are not
            one per text, or not finite; ``roles`` for a model without ``encode_query``.
        TypeError: a model of several encoders.
        ImportError: scikit-learn is not installed.
    """
    normalize = require("sklearn.preprocessing").normalize
    options = options or EncodeOptions()
    check_one_encoder(model)
    names: Sequence[str | None] = [None] * len(texts) if domains is None else domains
    keys = list(zip(texts, names, strict=True))
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    different = [text for text, _ in places]
    keywords = options.for_role(role)
    if domains is not None:
        keywords["domain"] = [domain for _, domain in places]
    if hasattr(model, "truncate"):  # a MoESentenceTransformer measures the texts itself
        keywords |= {} if options.truncate is None else {"truncate": options.truncate}
    else:
        different = _fitting(model, different, _prompt(model, role, options), options.truncate)
    vectors = _to_array(_encoder(model, role, options)(different, **keywords))
    if vectors.ndim != 2 or vectors.shape[0] != len(different):
        raise ValueError(
            f"model.encode must give one vector per text, [{len(different)}, d]; got shape "
            f"{tuple(vectors.shape)}"
        )
    values = vectors.data if hasattr(vectors, "toarray") else vectors
    if not np.isfinite(values).all():
        raise ValueError("model.encode gave vectors with NaN or infinite numbers")
    return normalize(vectors.astype(np.float64))[[places[key] for key in keys]]


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


def passes_domain(model: Any, options: EncodeOptions, domains_known: bool) -> bool:
    """Whether texts go to the model with their domains.

    Raises:
        ValueError: the options want it, and the data names no domains.
    """
    if options.pass_domain and not domains_known:
        raise ValueError("pass_domain=True needs data with domains; this data has none")
    if options.pass_domain is None:
        return options.domain is None and domains_known and wants_domains(model)
    return options.pass_domain


def _encoder(model: Any, role: Role, options: EncodeOptions) -> Any:
    if not options.roles:
        return model.encode
    name = f"encode_{role}"
    if not hasattr(model, name):
        raise ValueError(f"roles=True needs a model with {name}; got {type(model).__name__}")
    return getattr(model, name)


def _to_array(vectors: Any) -> Any:
    if hasattr(vectors, "detach"):  # a tensor; bfloat16 has no NumPy form
        return vectors.detach().float().cpu().numpy()
    return vectors if hasattr(vectors, "toarray") else np.asarray(vectors)


def _prompt(model: Any, role: Role, options: EncodeOptions) -> str:
    """The prompt that a ``SentenceTransformer`` will put in front of every text."""
    given = getattr(options, f"{role}_prompt")
    name = getattr(options, f"{role}_prompt_name")
    return prompt_of(model, given, name, role if options.roles else None)


def _fitting(model: Any, texts: list[str], prompt: str, truncate: bool | None) -> list[str]:
    """Texts that a stock ``SentenceTransformer``, which says nothing, may be given to cut."""
    limit, tokenizer = getattr(model, "max_seq_length", None), getattr(model, "tokenizer", None)
    long = measure_texts(tokenizer, texts, prompt, limit)
    long.settle(truncate)
    return shortened(texts, prompt, long)
