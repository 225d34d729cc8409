"""MoESentenceTransformer: a SentenceTransformer whose encoder is a mixture of experts.

When saved, it names only sentence-transformers' own modules. Therefore a stock
``SentenceTransformer(path)`` loads it without remote code after ``import moe_fast``, which
registers the architecture. The stock class takes one ``domain`` for a whole call, this class also
one per text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from moe_fast.extras import missing

try:
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise missing("sentence_transformers", "train", "MoESentenceTransformer", error) from error

import moe_fast.models  # noqa: F401  registers the architectures
from moe_fast import compat
from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.domain_prediction import PredictsDomains, with_predictions
from moe_fast.encoding.domains import asks_for_prediction, checked_domain, encode_by_domain
from moe_fast.encoding.lengths import (
    TokenizedText,
    measure_texts,
    prompt_length,
    shortened,
    tokenize_texts,
)
from moe_fast.encoding.model_card import use_domain
from moe_fast.encoding.pipeline import MoEPipeline
from moe_fast.encoding.plain_text import why_not_plain
from moe_fast.encoding.prompts import prompt_of
from moe_fast.models.domain_predictor import predictor_of
from moe_fast.models.modeling import MoEModelMixin
from moe_fast.ops.route.reference import NonFiniteLogitsError
from moe_fast.ops.varlen_attention.maintained import attention_kernel

# Names of encode's positional arguments after the texts.
_ENCODE_OPTIONS = tuple(inspect.signature(SentenceTransformer.encode).parameters)[2:]


class MoESentenceTransformer(PredictsDomains, MoEPipeline, SentenceTransformer):
    """A ``SentenceTransformer`` with a mixture of experts; made by :func:`moe_fast.upcycle`.

    Constructor and methods are those of ``SentenceTransformer``; ``encode`` also takes ``domain``,
    ``truncate`` and ``packed``.

    ``encode`` computes nothing for padding (``attn_implementation="moe_fast"``) on a CPU, and on a
    GPU in half precision, unless the encoder was given another attention than the default, "sdpa".

    Attributes:
        truncate: the default of ``encode``'s argument: whether texts that are too long are cut. Set
            it to ``True`` if other code calls ``encode``, such as an evaluator. It is not saved.
        packed: the default of ``encode``'s argument: whether padding is left out. It is not saved.
    """

    model_type = "SentenceTransformer"  # it is saved and loaded as one
    _mixture = MoEModelMixin  # bare

    def __init__(self, *args: Any, truncate: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.truncate = truncate
        self.packed = True

    @compat.overrides
    def encode(
        self,
        inputs: Any = None,
        *args: Any,
        domain: str | Sequence[str] | None = None,
        truncate: bool | None = None,
        packed: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``SentenceTransformer.encode``, with one domain for all texts or one per text.

        Any number of threads may encode with one model: a call changes nothing that another can
        see. The exception is a model in training mode or on another ``device``, which
        ``SentenceTransformer.encode`` puts into evaluation mode and moves.

        Args:
            inputs: a text or a sequence of texts.
            domain: a domain's name, or a sequence with one name per text. "auto" in the place of a
                name: the domain that :meth:`predict_domain` predicts. ``None``: the learned router,
                or the model's ``default_domain``.
            truncate: cut texts longer than ``max_seq_length`` tokens, and warn how many were cut;
                otherwise such a text is an error before any work starts. ``None``: the attribute
                ``truncate`` decides. Only plain strings are measured.
            packed: leave padding out if that is faster. ``None``: the attribute ``packed`` decides.

        Returns:
            The result of ``SentenceTransformer.encode``, in the order of ``inputs``.

        Raises:
            ValueError: for an unknown domain (the message lists the known ones), for no domain if
                one is needed, if the number of domains is not that of the texts, for "auto" where
                no predictor knows all domains, for texts that are too long, and for a text for
                which a learned router computes NaN or infinity.
            TypeError: for a ``domain`` that is neither a name nor a sequence of names.
        """
        if inputs is None:
            inputs = kwargs.pop("sentences", None)  # its former name
        kwargs.update(zip(_ENCODE_OPTIONS, args, strict=False))
        singular = self.is_singular_input(inputs)
        texts = [inputs] if singular else list(inputs)
        config = self.transformers_model.config
        domain = checked_domain(config, use_domain(domain), len(texts), auto=True)
        if asks_for_prediction(domain):
            predictor_of(self.transformers_model)  # or an error, before any work
        if self.packed if packed is None else packed:
            kwargs["packed"] = True
        texts = self._prepared(texts, kwargs, self.truncate if truncate is None else truncate)
        if domain is not None and asks_for_prediction(domain):
            domain = with_predictions(self, texts, domain, kwargs)
        if isinstance(domain, list) and not singular and texts:
            return encode_by_domain(super().encode, texts, domain, kwargs)
        if isinstance(domain, list):
            domain = domain[0] if domain else None
        options = {} if domain is None else {"domain": domain}
        if singular and isinstance(texts[0], TokenizedText):
            return super().encode(texts, **options, **kwargs)[0]
        return super().encode(texts[0] if singular else texts, **options, **kwargs)

    def _prepared(self, texts: list[Any], options: dict[str, Any], truncate: bool) -> list[Any]:
        """Tokenize the texts and cut long ones; return other inputs, and those of pools, unchanged.

        Raises:
            ValueError: for texts that are too long, unless ``truncate`` is true.
        """
        if not texts or not all(isinstance(text, str) for text in texts):
            return texts
        prompt = prompt_of(self, options.get("prompt"), options.get("prompt_name"))
        if self._is_plain(options):
            tokenized, long = tokenize_texts(self.tokenizer, texts, prompt, self.max_seq_length)
            long.settle(truncate)
            return tokenized
        long = measure_texts(self.tokenizer, texts, prompt, self.max_seq_length)
        long.settle(truncate)
        return shortened(texts, prompt, long)

    def tokenize_ahead(
        self, texts: Sequence[str], *, truncate: bool | None = None, **options: Any
    ) -> list[TokenizedText] | None:
        """Tokenize texts that a later call of :meth:`encode` is given in place of the texts.

        Any thread may do it while another one encodes, which then need not wait for the tokenizer.

        Args:
            texts: N texts.
            truncate: as for :meth:`encode`.
            options: those of that call, such as ``prompt_name``.

        Returns:
            The N texts as :meth:`encode` takes them, with the same ``options``; ``None``: that call
            needs the texts themselves.

        Raises:
            ValueError: for texts that are too long, unless ``truncate`` is true.
        """
        if not texts or not self._is_plain(options):
            return None
        return self._prepared(list(texts), options, self.truncate if truncate is None else truncate)

    def _is_plain(self, options: dict[str, Any]) -> bool:
        """Whether this call needs only the tokens of the texts, in this process."""
        elsewhere = options.get("pool") is not None or isinstance(
            options.get("device"), (list, tuple)
        )
        own = elsewhere or options.get("processing_kwargs")
        return not own and why_not_plain(self) is None

    @compat.overrides
    def get_model_kwargs(self) -> list[str]:
        """As ``SentenceTransformer``'s: the keywords that ``encode`` passes to ``forward``."""
        return [*super().get_model_kwargs(), "packed"]

    @compat.overrides
    def preprocess(
        self, inputs: Any, prompt: str | None = None, packed: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As ``SentenceTransformer.preprocess``, also for texts that ``encode`` has tokenized."""
        if not inputs or not isinstance(inputs[0], TokenizedText):
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        features: dict[str, Any] = padded_batch(inputs, self.tokenizer)
        features["modality"] = "text"
        if prompt:
            features["prompt_length"] = prompt_length(self.tokenizer, prompt, self.max_seq_length)
        if not compat.is_compiled(self):  # it would be compiled again for every batch
            features["text_index"] = [text.place for text in inputs]
        return features

    @compat.overrides
    def forward(self, input: dict[str, Any], packed: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As ``SentenceTransformer.forward``.

        Args:
            input: the features of a batch, as :meth:`preprocess` makes them.
            packed: leave padding out if the result is the same and faster, see docs/packed.md.
        """
        places = input.pop("text_index", None)
        if packed and self.packs():
            input["packed"] = True
        try:
            output = super().forward(input, **kwargs)
        except NonFiniteLogitsError as error:
            raise self._naming_the_text(error, input, places, kwargs) from error
        output.pop("packed", None)
        return output

    def packs(self) -> bool:
        """Whether attention without padding gives the same result, and is faster.

        Where it does not, ``packed`` has no effect.
        """
        encoder = self.transformers_model
        dtype, kind = encoder.dtype, self.device.type
        faster = kind == "cpu" or attention_kernel(kind, dtype) != "sdpa"
        # A compiled model is a graph for padded batches; only "eager" returns attention weights.
        compiled = any(compat.is_compiled(m) for m in (self, encoder))
        default = compat.attention_of(encoder.config) == "sdpa"
        return default and faster and not compiled and not encoder.config.output_attentions

    def _naming_the_text(
        self,
        error: NonFiniteLogitsError,
        batch: dict[str, Any],
        places: list[int] | None,
        options: dict[str, Any],
    ) -> NonFiniteLogitsError:
        """The error with the index of the first text of the batch that causes it."""
        for row, place in enumerate(places or ()):
            alone = {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            try:
                super().forward(alone, **options)
            except NonFiniteLogitsError as of_the_text:
                return NonFiniteLogitsError(f"text {place}: {of_the_text}")
        return error
