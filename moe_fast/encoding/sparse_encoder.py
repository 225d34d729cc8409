"""MoESparseEncoder: a SparseEncoder (SPLADE, CSR) whose encoder is a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_fast.extras import missing

try:
    from sentence_transformers import SparseEncoder
except ImportError as error:
    raise missing("sentence_transformers", "train", "MoESparseEncoder", error) from error

import moe_fast.models  # noqa: F401  registers the architectures
from moe_fast import compat
from moe_fast.encoding.domain_prediction import PredictsDomains
from moe_fast.encoding.domain_texts import with_domains
from moe_fast.encoding.model_card import use_domain
from moe_fast.encoding.pipeline import DomainTextPipeline


class MoESparseEncoder(PredictsDomains, DomainTextPipeline, SparseEncoder):
    """A ``SparseEncoder`` whose encoder is a mixture of experts.

    :func:`moe_fast.upcycle` makes one of a dense ``SparseEncoder``. Constructor and methods are
    those of ``SparseEncoder``; ``encode``, ``encode_query`` and ``encode_document`` also take
    ``domain``, for all texts or one per text. For SPLADE the mixture has a masked language model's
    head (``MoEBertForMaskedLM``). An embedding then has a column for each token of the vocabulary,
    followed by one for each domain token (the token that tells the encoder a text's domain, in
    place of [CLS]). Longer texts are cut at ``max_seq_length``, as by ``SparseEncoder``.

    After ``import moe_fast`` a plain ``SparseEncoder`` also loads a saved ``MoESparseEncoder``, and
    then takes one ``domain`` for a whole call.
    """

    @compat.overrides
    def encode(
        self,
        inputs: Any = None,
        *args: Any,
        domain: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``SparseEncoder.encode``, with one domain for all texts or one per text.

        Args:
            inputs: a text or a sequence of texts.
            domain: a domain's name, or as many as there are texts; "auto" in the place of a name:
                the one that :meth:`predict_domain` predicts. ``None``: that of each text that is a
                :class:`~moe_fast.encoding.domain_texts.DomainText`; else the model's
                ``default_domain``, or a learned router alone.

        Raises:
            ValueError: for an unknown domain (the message lists the known ones), a number of
                domains that is not that of the texts, and no domain where one is needed.
            TypeError: for a ``domain`` that is neither a name nor a sequence of names.
        """
        if inputs is None:
            inputs = kwargs.pop("sentences", None)  # the name it had before
        marked = with_domains(self, inputs, use_domain(domain), kwargs)
        return super().encode(marked, *args, **kwargs)
