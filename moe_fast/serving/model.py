"""ServedModel: a model that embeds token ids, with a domain for each text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.domain_prediction import with_predictions
from moe_fast.encoding.domains import asks_for_prediction, checked_domain, domains_of
from moe_fast.encoding.lengths import (
    TokenizedText,
    counted_truncation,
    prompt_length,
    tokenize_texts,
)
from moe_fast.encoding.loading import load_model
from moe_fast.encoding.plain_text import why_not_plain
from moe_fast.encoding.prompts import prompt_of
from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
from moe_fast.messages import shown
from moe_fast.models.configuration import AUTO
from moe_fast.models.domain_predictor import predictor_of
from moe_fast.serving.batcher import Text, Vectors
from moe_fast.serving.errors import RequestError
from moe_fast.serving.settings import ServerSettings

_PADDED_TEXTS = 32  # per forward pass of a model that computes padding, as in encode


class ServedModel:
    """The model of a server.

    Attributes:
        name: the name by which requests ask for it.
        dimension: the number of elements of a vector.
        domains: the names of its domains; none for a dense model.
        max_length: the most tokens of a text, or ``None``.
        prompts: its prompts by name.

    Raises:
        ValueError: the model embeds something other than texts, or needs more than their tokens; a
            dtype for a model of 8-bit integers.
        OSError, TypeError, ImportError: as :func:`moe_fast.inference.load_model`.
    """

    def __init__(self, settings: ServerSettings) -> None:
        model = load_model(settings.model, device=settings.device)
        reason = why_not_plain(model)
        if reason is not None:
            raise ValueError(f"model {settings.model!r} cannot be served: {reason}")
        if settings.dtype is not None:
            if getattr(model.transformers_model.config, "quantization", None) is not None:
                raise ValueError(
                    f"dtype must be None for a model of 8-bit integers; got {settings.dtype!r}"
                )
            model.to(getattr(torch, settings.dtype))
        self._model = model.eval()
        self._tokenizer = model.tokenizer
        self._vocabulary = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._first, self._last = _special_ids(self._tokenizer)
        self.name = settings.name or Path(settings.model).name or settings.model
        self.dimension = int(model.get_embedding_dimension())
        self.domains = domains_of(model)
        self.max_length: int | None = model.max_seq_length
        self.prompts = dict(model.prompts or {})
        self._normalizes = any(type(module).__name__ == "Normalize" for module in model)
        self._skips_prompt = any(not getattr(module, "include_prompt", True) for module in model)
        self._is_mixture = isinstance(model, MoESentenceTransformer)

    def describe(self, fields: dict[str, Any]) -> None:
        """Add to the JSON schemas of a request's fields what this model allows."""
        fields["model"]["enum"] = [self.name]
        fields["dimensions"]["anyOf"][0] |= {"minimum": 1, "maximum": self.dimension}
        ids, lists = fields["input"]["anyOf"][2:]
        for schema in (ids["items"], lists["items"]["items"]):
            schema |= {"minimum": 0, "maximum": self._vocabulary - 1}
        domains = list(self.domains)
        if getattr(self._model.transformers_model.config, "domain_predictor", None) is not None:
            domains.append(AUTO)
        for field, names in (("domain", domains), ("prompt_name", sorted(self.prompts))):
            forms = fields[field]["anyOf"] if names else [fields[field]["anyOf"].pop()]
            fields[field]["anyOf"] = forms
            for schema in forms:
                if (one := schema.get("items", schema)).get("type") == "string":
                    one["enum"] = names

    # --- from a request to texts ------------------------------------------------------------------

    def domain_names(self, domain: str | list[str] | None, num_texts: int) -> list[str | None]:
        """The domain of each text, which may be "auto", one that is predicted.

        Raises:
            RequestError: an unknown domain, none where one is needed, not one per text, or "auto"
                where no predictor knows all domains.
        """
        if domain is not None and not self.domains:
            raise RequestError(f"the model {self.name!r} has no domains", "domain")
        if not self.domains:
            return [None] * num_texts
        config = self._model.transformers_model.config
        try:
            names = checked_domain(config, domain, num_texts, auto=True)
            if asks_for_prediction(names):
                predictor_of(self._model.transformers_model)
        except (ValueError, TypeError) as error:
            raise RequestError(str(error), "domain") from error
        if not isinstance(names, list):
            names = [names if names is not None else config.default_domain] * num_texts
        return list(names)

    def domain_ids(
        self, names: Sequence[str | None], texts: Sequence[TokenizedText]
    ) -> list[int | None]:
        """The indices of the texts' domains, which :meth:`domain_names` has checked."""
        known = [name for name in names if name is not None]
        if AUTO in known:
            names = with_predictions(self._model, list(texts), known, {})
        config = self._model.transformers_model.config
        return [None if name is None else config.domain_id(name) for name in names]

    def tokenize(
        self, texts: list[str], prompt_name: str | None, truncate: bool
    ) -> list[TokenizedText]:
        """Tokenize texts after the prompt of this name (``None``: the model's default, if any).

        Raises:
            RequestError: an unknown prompt, or a text that is too long and must not be cut.
        """
        for i, text in enumerate(texts):
            if not text.isascii() and not _is_unicode(text):
                raise RequestError(
                    f"texts must be Unicode; text {i} has half of a surrogate pair", "input"
                )
        prompt = self._prompt(prompt_name)
        try:
            tokenized, long = tokenize_texts(self._tokenizer, texts, prompt, self.max_length)
            with counted_truncation():  # the answer counts the tokens that were used
                long.settle(truncate)
        except ValueError as error:
            raise RequestError(str(error), "input") from error
        return tokenized

    def check_ids(self, ids: Sequence[int], place: int, truncate: bool) -> TokenizedText:
        """A text given as ids, which must be those that the model's tokenizer makes.

        Raises:
            RequestError: an id outside the vocabulary, missing special tokens, or too many ids.
        """
        wrong = next((i for i in ids if not 0 <= i < self._vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"token ids must lie in [0, {self._vocabulary}), the model's vocabulary; text "
                f"{place} has {wrong}",
                "input",
            )
        first, last = self._first, self._last
        if list(ids[: len(first)]) != first or list(ids[len(ids) - len(last) :]) != last:
            raise RequestError(
                "token ids must be those of the model's own tokenizer with its special tokens: "
                f"{first} first and {last} last; text {place} has {list(ids[:1])} and "
                f"{list(ids[-1:])}",
                "input",
            )
        if self.max_length is not None and len(ids) > self.max_length:
            if not truncate:
                raise RequestError(
                    f"texts must have at most {self.max_length} tokens; text {place} has "
                    f"{len(ids)}. Pass truncate=true to cut them",
                    "input",
                )
            ids = self._cut(ids)
        row = np.array(ids, np.int32)
        has_types = "token_type_ids" in self._tokenizer.model_input_names
        return TokenizedText(row, np.zeros_like(row) if has_types else None, place)

    def check_dimension(self, dimension: int | None) -> None:
        """Raise RequestError unless vectors can be cut to so many elements."""
        if dimension is not None and not 1 <= dimension <= self.dimension:
            raise RequestError(
                f"dimensions must lie in [1, {self.dimension}]; got {dimension}", "dimensions"
            )

    def prompt_length(self, prompt_name: str | None) -> int | None:
        """The number of the prompt's tokens that the pooling leaves out, or ``None``."""
        prompt = self._prompt(prompt_name)
        if not prompt or not self._skips_prompt:
            return None
        return prompt_length(self._tokenizer, prompt, self.max_length)

    def _prompt(self, name: str | None) -> str:
        if name is not None and name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "it has none"
            raise RequestError(
                f"prompt_name must be one of the model's ({known}); got {shown(name)}",
                "prompt_name",
            )
        return prompt_of(self._model, None, name)

    def _cut(self, ids: Sequence[int]) -> list[int]:
        """The first tokens that fit (the last ones, if the tokenizer cuts texts from the left)."""
        assert self.max_length is not None
        inner = ids[len(self._first) : len(ids) - len(self._last)]
        size = self.max_length - len(self._first) - len(self._last)
        if self._tokenizer.truncation_side == "left":
            return [*self._first, *inner[len(inner) - size :], *self._last]
        return [*self._first, *inner[:size], *self._last]

    # --- from texts to vectors --------------------------------------------------------------------

    def embed(self, texts: Sequence[Text]) -> Vectors:
        """Embed texts of one ``prompt_length`` as [N, d] float32, in one pass without padding.

        A model that computes padding takes them by length, 32 at a time.
        """
        if self._is_mixture and self._model.packs():
            return self._forward(texts)
        order = np.argsort([-len(text.ids) for text in texts], kind="stable")
        parts = [order[i : i + _PADDED_TEXTS] for i in range(0, len(order), _PADDED_TEXTS)]
        vectors = np.concatenate([self._forward([texts[i] for i in part]) for part in parts])
        result = np.empty_like(vectors)
        result[order] = vectors
        return result

    def sample(self) -> Text:
        """A text to compute before the first request, which would be slow otherwise."""
        (one,), _ = tokenize_texts(self._tokenizer, ["warm up"], "", self.max_length)
        return Text(one.ids, one.type_ids, 0 if self.domains else None)

    def shortened(self, vectors: Vectors, dimension: int | None) -> Vectors:
        """The first elements of vectors [N, d], of length 1 again if the model's vectors are."""
        if dimension is None or dimension == self.dimension:
            return vectors
        vectors = np.ascontiguousarray(vectors[:, :dimension])
        if self._normalizes:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, 1e-12)
        return vectors

    @torch.inference_mode()
    def _forward(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        tokenized = [TokenizedText(text.ids, text.type_ids, i) for i, text in enumerate(texts)]
        features: dict[str, Any] = padded_batch(tokenized, self._tokenizer)
        features["modality"] = "text"
        if texts[0].prompt_length is not None:
            features["prompt_length"] = texts[0].prompt_length
        if self.domains and texts[0].domain_id is not None:
            features["domain_ids"] = torch.tensor([text.domain_id for text in texts])
        device = self._model.device
        features = {
            k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in features.items()
        }
        options = {"packed": True} if self._is_mixture else {}
        vectors = self._model(features, **options)["sentence_embedding"]
        return vectors.float().cpu().numpy()


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may contain what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text."""
    row = tokenizer("a", return_special_tokens_mask=True)
    ids, special = row["input_ids"], row["special_tokens_mask"]
    first = special.index(0) if 0 in special else len(special)
    last = special[::-1].index(0) if 0 in special else 0
    return ids[:first], ids[len(ids) - last :]
