"""MoESentenceTransformer: a SentenceTransformer whose encoder is a mixture of experts.

A saved one names sentence-transformers' own modules only, so a stock ``SentenceTransformer(path)``
loads it without remote code after ``import moe_fast`` (which registers the architecture); the
stock class takes one ``domain`` for a whole call, this one also one per text.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise ImportError(
        "MoESentenceTransformer needs sentence-transformers: pip install 'moe-fast[train]'."
    ) from error

import moe_fast.models  # noqa: F401  registers the architectures
from moe_fast.files import atomic_write
from moe_fast.models.extract import extract_expert
from moe_fast.models.model_card import describe_mixture
from moe_fast.models.modeling import MoEModelMixin
from moe_fast.models.upcycle import upcycle

logger = logging.getLogger(__name__)


class MoESentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` on a mixture of experts; made by :func:`moe_fast.upcycle`.

    Constructor and methods are ``SentenceTransformer``'s; ``encode`` takes ``domain`` too.
    """

    model_type = "SentenceTransformer"  # what is saved is one, and loads as one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.transformers_model, MoEModelMixin):
            raise TypeError(
                "MoESentenceTransformer needs a mixture of experts; got "
                f"{type(self.transformers_model).__name__}. Make one with moe_fast.upcycle(...)."
            )
        # Lets `domain` through encode() to the encoder, here and (saved in modules.json) in the
        # stock class.
        first = next(iter(self._modules))
        own = (self.module_kwargs or {}).get(first, [])
        self.module_kwargs = {
            **(self.module_kwargs or {}),
            first: own if "domain" in own else [*own, "domain"],
        }

    def encode(
        self,
        inputs: Any,
        *args: Any,
        domain: str | Sequence[str] | None = None,
        truncate: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As ``SentenceTransformer.encode``, with one domain for all texts or one per text.

        Args:
            inputs: a text or a sequence of texts.
            domain: a domain's name, or a sequence of as many names as there are texts. ``None``:
                the learned router, or the model's ``default_domain``.
            truncate: cut texts longer than ``max_seq_length`` tokens, with a warning that says
                how many; otherwise such a text is an error before any work starts.

        Returns:
            What ``SentenceTransformer.encode`` returns, in the order of ``inputs``.

        Raises:
            ValueError: for an unknown domain (the message lists the known ones), a number of
                domains that is not that of the texts, no domain where one is needed, and texts
                that are too long.
        """
        singular = self.is_singular_input(inputs)
        texts = [inputs] if singular else list(inputs)
        self._check_domains(domain, len(texts))
        self._check_lengths(texts, args, kwargs, truncate)
        if domain is None:
            return super().encode(inputs, *args, **kwargs)
        if isinstance(domain, str):
            return super().encode(inputs, *args, domain=domain, **kwargs)
        if singular:
            return super().encode(inputs, *args, domain=domain[0], **kwargs)
        return self._encode_by_domain(texts, list(domain), args, kwargs)

    def _encode_by_domain(
        self, texts: list[Any], domains: list[str], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """One call per domain, its results put back where its texts stood."""
        if not texts:
            return super().encode(texts, *args, **kwargs)
        places: list[int] = []
        parts = []
        for name in sorted(set(domains)):
            here = [i for i, d in enumerate(domains) if d == name]
            places += here
            part = [texts[i] for i in here]
            parts.append(super().encode(part, *args, domain=name, **kwargs))
        order = np.argsort(places)
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)[order]
        flat = [item for part in parts for item in part]
        return [flat[i] for i in order]

    def _check_domains(self, domain: str | Sequence[str] | None, num_texts: int) -> None:
        config = self.transformers_model.config
        if domain is None:
            if config.routing == "enforced" and config.default_domain is None:
                raise ValueError(
                    "domain must be given: the model routes by domain and has no default_domain. "
                    f"Known domains: {', '.join(config.domains) or 'none'}; got None."
                )
            return
        if not isinstance(domain, str) and len(domain) != num_texts:
            raise ValueError(
                f"domain must be one name or one per text; got {len(domain)} names for "
                f"{num_texts} texts."
            )
        for name in [domain] if isinstance(domain, str) else set(domain):
            config.domain_id(name)

    def _check_lengths(
        self, texts: list[Any], args: tuple, kwargs: dict[str, Any], truncate: bool
    ) -> None:
        """Find texts that tokenize to more than ``max_seq_length``."""
        limit = self.max_seq_length
        if limit is None or not all(isinstance(t, str) for t in texts):
            return
        prompt_name = args[0] if args else kwargs.get("prompt_name")
        prompt = self._resolve_prompt(
            args[1] if len(args) > 1 else kwargs.get("prompt"), prompt_name
        )
        prompted = [(prompt or "") + text for text in texts]
        # A token stands for at least one character: shorter texts need no count.
        extra = self.tokenizer.num_special_tokens_to_add()
        suspects = [i for i, text in enumerate(prompted) if len(text) + extra > limit]
        if not suspects:
            return
        ids = self.tokenizer(
            [prompted[i] for i in suspects], truncation=False, padding=False, verbose=False
        )["input_ids"]
        long = [(i, len(row)) for i, row in zip(suspects, ids, strict=True) if len(row) > limit]
        if not long:
            return
        if not truncate:
            raise ValueError(
                f"inputs must have at most max_seq_length = {limit} tokens each; text {long[0][0]} "
                f"has {long[0][1]} ({len(long)} of {len(texts)} texts are too long). Pass "
                "truncate=True to cut them."
            )
        logger.warning(
            "%d of %d texts are longer than max_seq_length = %d tokens and were truncated.",
            len(long),
            len(texts),
            limit,
        )

    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As sentence-transformers', with a section that says how the mixture was made."""
        model = self.transformers_model
        domain = model.config.default_domain
        if domain is None and model.config.routing == "enforced" and model.config.domains:
            domain = model.config.domains[0]
        with _default_domain(model.config, domain):
            super()._create_model_card(path, *args, **kwargs)
        card = Path(path, "README.md")
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        text = _with_usage(text.split(_CARD_HEADING)[0].rstrip(), domain)
        text += "\n\n" + describe_mixture(
            model.config, model.num_parameters(), model.num_parameters(only_active=True)
        )
        with atomic_write(card) as partial:
            partial.write_text(text, encoding="utf-8")


_CARD_HEADING = "\n## Mixture of experts\n"


@contextmanager
def _default_domain(config: Any, domain: str | None) -> Iterator[None]:
    """Let sentence-transformers run its usage example on a model that needs a domain."""
    before, config.default_domain = config.default_domain, domain
    try:
        yield
    finally:
        config.default_domain = before


def _with_usage(card: str, domain: str | None) -> str:
    """sentence-transformers' usage example, made to run on a mixture."""
    load = "from sentence_transformers import SentenceTransformer\n"
    register = "import moe_fast  # registers the architecture: pip install 'moe-fast[train]'\n"
    if register not in card:
        card = card.replace(load, register + load, 1)
    if domain is None:
        return card
    return re.sub(r"(model\.encode\w*\(\w+)\)", rf'\1, domain="{domain}")', card)


def load_sentence_transformer(path: str) -> SentenceTransformer:
    """The stock ``SentenceTransformer`` in a folder or under a hub id, on the CPU."""
    return SentenceTransformer(path, device="cpu")


def upcycle_sentence_transformer(
    model: SentenceTransformer, **settings: Any
) -> MoESentenceTransformer:
    """What :func:`moe_fast.upcycle` does with a ``SentenceTransformer``."""
    encoder = _encoder(model)
    if settings["cls_token_id"] is None and model.tokenizer is not None:
        settings["cls_token_id"] = model.tokenizer.cls_token_id
    return _with_encoder(MoESentenceTransformer, model, upcycle(encoder, **settings))


def extract_sentence_transformer(
    model: SentenceTransformer, expert: int | str, *, keep_domain_tokens: bool
) -> SentenceTransformer:
    """What :func:`moe_fast.extract_expert` does with a ``SentenceTransformer``."""
    dense = extract_expert(_encoder(model), expert, keep_domain_tokens=keep_domain_tokens)
    extracted = _with_encoder(SentenceTransformer, model, dense)
    extracted.module_kwargs = {
        name: [k for k in keys if k != "domain"]
        for name, keys in (model.module_kwargs or {}).items()
    }
    return extracted


def _encoder(model: SentenceTransformer) -> nn.Module:
    encoder = model.transformers_model
    if encoder is None:
        raise TypeError(
            f"model's first module must hold a transformers encoder; got {type(model[0]).__name__}."
        )
    return encoder


def _with_encoder(
    cls: type[SentenceTransformer], model: SentenceTransformer, encoder: nn.Module
) -> SentenceTransformer:
    """A copy of ``model`` as ``cls`` whose transformers encoder is ``encoder``."""
    old = _encoder(model)
    # The old encoder is shared into the copy, not copied, and then replaced.
    modules = OrderedDict(copy.deepcopy(dict(model._modules), {id(old): old}))
    first = next(iter(modules.values()))
    first.model = encoder
    first._method_signature_cache = {}
    first._declared_forward_params |= {"expert_ids", "domain", "domain_ids"}
    new = cls(
        modules=modules,
        device=str(model.device),
        prompts=copy.deepcopy(model.prompts),
        default_prompt_name=model.default_prompt_name,
    )
    new.module_kwargs = {**copy.deepcopy(model.module_kwargs or {}), **(new.module_kwargs or {})}
    new.similarity_fn_name = model.similarity_fn_name
    new.truncate_dim = model.truncate_dim
    return new.train(model.training)
