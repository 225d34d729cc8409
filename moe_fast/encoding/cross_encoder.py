"""MoECrossEncoder: a CrossEncoder (reranker) whose encoder is a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_fast.extras import missing

try:
    from sentence_transformers import CrossEncoder
except ImportError as error:
    raise missing("sentence_transformers", "train", "MoECrossEncoder", error) from error

import moe_fast.models  # noqa: F401  registers the architectures
from moe_fast import compat
from moe_fast.encoding.domain_texts import with_domains
from moe_fast.encoding.model_card import use_domain
from moe_fast.encoding.pipeline import DomainTextPipeline


class MoECrossEncoder(DomainTextPipeline, CrossEncoder):
    """A ``CrossEncoder`` on a mixture of experts; :func:`moe_fast.upcycle` makes one of another.

    Constructor and methods are ``CrossEncoder``'s; ``predict`` and ``rank`` take ``domain`` too.
    The mixture is one with a classifier of texts (``MoEBertForSequenceClassification``). Longer
    pairs are cut at ``max_seq_length``, as ``CrossEncoder`` does.

    A saved one is a ``CrossEncoder``, which after ``import moe_fast`` loads it, too, and whose
    ``predict`` takes one ``domain`` for a whole call.
    """

    @compat.overrides
    def predict(
        self,
        inputs: Any = None,
        *args: Any,
        domain: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``CrossEncoder.predict``, with one domain for all pairs or one per pair.

        Args:
            inputs: a pair of texts or a sequence of pairs.
            domain: a domain's name, or as many as there are pairs. ``None``: that of each pair
                whose first text is a :class:`~moe_fast.encoding.domain_texts.DomainText`; else the
                model's ``default_domain``, or a learned router alone.

        Raises:
            ValueError: for an unknown domain (the message lists the known ones), a number of
                domains that is not that of the pairs, and no domain where one is needed.
            TypeError: for a ``domain`` that is neither a name nor a sequence of names.
        """
        if inputs is None:
            inputs = kwargs.pop("sentences", None)  # the name it had before
        return super().predict(with_domains(self, inputs, use_domain(domain)), *args, **kwargs)

    @compat.overrides
    def rank(
        self,
        query: Any,
        documents: Sequence[Any],
        *args: Any,
        domain: str | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """As ``CrossEncoder.rank``; ``domain`` is the query's, one name."""
        if domain is not None:
            self.transformers_model.config.domain_id(domain)
            (query, _) = with_domains(self, (query, ""), domain)
        return super().rank(query, documents, *args, **kwargs)
