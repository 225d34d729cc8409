"""MoESentenceTransformer: a SentenceTransformer whose encoder is a mixture of experts.

A saved one names sentence-transformers' own modules only, so a stock ``SentenceTransformer(path)``
loads it without remote code after ``import moe_fast`` (which registers the architecture); the
stock class takes one ``domain`` for a whole call, this one also one per text.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_fast.extras import missing

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from sentence_transformers.util import quantize_embeddings
except ImportError as error:
    raise missing("sentence_transformers", "train", "MoESentenceTransformer", error) from error

import moe_fast.models  # noqa: F401  registers the architectures
from moe_fast import compat
from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.lengths import (
    TokenizedText,
    measure_texts,
    prompt_length,
    shortened,
    tokenize_texts,
)
from moe_fast.encoding.prompts import prompt_of
from moe_fast.files import atomic_folder, atomic_write
from moe_fast.models.extract import extract_expert
from moe_fast.models.join import check_same_tokenizers, join_encoders, mean_state
from moe_fast.models.json_files import read_modules
from moe_fast.models.loading import check_checkpoint, naming
from moe_fast.models.model_card import describe_mixture
from moe_fast.models.modeling import MoEModelMixin, replaced_files
from moe_fast.models.strict import check_encoder_weights
from moe_fast.models.upcycle import upcycle
from moe_fast.ops.route.reference import NonFiniteLogitsError
from moe_fast.ops.varlen_attention.maintained import attention_kernel
from moe_fast.version import install_command

# Names of encode's positional arguments behind the texts.
_ENCODE_OPTIONS = tuple(inspect.signature(SentenceTransformer.encode).parameters)[2:]


class MoESentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` on a mixture of experts; made by :func:`moe_fast.upcycle`.

    Constructor and methods are ``SentenceTransformer``'s; ``encode`` takes ``domain`` and
    ``truncate`` too.

    ``encode`` leaves padding out (``attn_implementation="moe_fast"``) on a CPU, and on a GPU in
    half precision, unless the encoder was given another attention than the default, "sdpa".

    Attributes:
        truncate: what ``encode`` does with texts that are too long unless told otherwise; set it
            to ``True`` where somebody else calls ``encode``, such as an evaluator. Not saved.
        packed: ``False``: ``encode`` computes padding, too, as the encoder's attention does. Not
            saved.
    """

    model_type = "SentenceTransformer"  # what is saved is one, and loads as one

    def __init__(self, *args: Any, truncate: bool = False, **kwargs: Any) -> None:
        compat.check_overrides(type(self))
        path = args[0] if args else kwargs.get("model_name_or_path")
        if isinstance(path, (str, os.PathLike)):
            check_checkpoint(path)
        super().__init__(*args, **kwargs)
        check_one_encoder(self)
        if not isinstance(self.transformers_model, MoEModelMixin):
            raise TypeError(
                "MoESentenceTransformer needs a mixture of experts; got "
                f"{type(self.transformers_model).__name__}. Make one with moe_fast.upcycle(...)."
            )
        self.truncate = truncate
        self.packed = True
        # Lets `domain` through encode() to the encoder, here and (saved in modules.json) in the
        # stock class.
        first = next(iter(compat.child_modules(self)))
        own = (self.module_kwargs or {}).get(first, [])
        self.module_kwargs = {
            **(self.module_kwargs or {}),
            first: own if "domain" in own else [*own, "domain"],
        }

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
        see, but for what ``SentenceTransformer.encode`` does to a model in training mode or on
        another ``device`` (it is put into evaluation mode, and moved).

        Args:
            inputs: a text or a sequence of texts.
            domain: a domain's name, or a sequence of as many names as there are texts. ``None``:
                the learned router, or the model's ``default_domain``.
            truncate: cut texts longer than ``max_seq_length`` tokens, with a warning that says
                how many; otherwise such a text is an error before any work starts. ``None``: as
                the attribute says. Only plain strings are measured.
            packed: leave padding out where that is faster. ``None``: as the attribute says.

        Returns:
            What ``SentenceTransformer.encode`` returns, in the order of ``inputs``.

        Raises:
            ValueError: for an unknown domain (the message lists the known ones), a number of
                domains that is not that of the texts, no domain where one is needed, texts that
                are too long, and a text for which a learned router computes NaN or infinity.
            TypeError: for a ``domain`` that is neither a name nor a sequence of names.
        """
        if inputs is None:
            inputs = kwargs.pop("sentences", None)  # the name it had before
        kwargs.update(zip(_ENCODE_OPTIONS, args, strict=False))
        singular = self.is_singular_input(inputs)
        texts = [inputs] if singular else list(inputs)
        domain = self._checked_domain(domain, len(texts))
        if self.packed if packed is None else packed:
            kwargs["packed"] = True
        texts = self._prepared(texts, kwargs, self.truncate if truncate is None else truncate)
        if isinstance(domain, list) and not singular and texts:
            return self._encode_by_domain(texts, domain, kwargs)
        if isinstance(domain, list):
            domain = domain[0] if domain else None
        options = {} if domain is None else {"domain": domain}
        if singular and isinstance(texts[0], TokenizedText):
            return super().encode(texts, **options, **kwargs)[0]
        return super().encode(texts[0] if singular else texts, **options, **kwargs)

    def _prepared(self, texts: list[Any], options: dict[str, Any], truncate: bool) -> list[Any]:
        """The texts as tokens, none of them too long; other inputs, and those of pools, as given.

        Raises:
            ValueError: for texts that are too long, unless they are to be cut.
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

    def _is_plain(self, options: dict[str, Any]) -> bool:
        """Whether a text is its tokens and no more, in this process and for this call."""
        first = self[0]
        elsewhere = options.get("pool") is not None or isinstance(
            options.get("device"), (list, tuple)
        )
        by_task = ("query_length", "document_length", "query_expansion")
        return (
            type(first) is Transformer
            and not elsewhere
            and first.modalities == ["text"]
            and compat.is_plain_call(self)
            and not first.processing_kwargs
            and not options.get("processing_kwargs")
            and not any(getattr(first, name, None) is not None for name in by_task)
            and self.tokenizer.pad_token_id is not None
        )

    @compat.overrides
    def get_model_kwargs(self) -> list[str]:
        """As ``SentenceTransformer``'s: the names that ``encode`` hands on to ``forward``."""
        return [*super().get_model_kwargs(), "packed"]

    @compat.overrides
    def preprocess(
        self, inputs: Any, prompt: str | None = None, packed: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As ``SentenceTransformer.preprocess``, also for what ``encode`` has tokenized already."""
        if not inputs or not isinstance(inputs[0], TokenizedText):
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        features: dict[str, Any] = padded_batch(inputs, self.tokenizer)
        features["modality"] = "text"
        if prompt:
            features["prompt_length"] = prompt_length(self.tokenizer, prompt, self.max_seq_length)
        if not compat.is_compiled(self):  # it would be compiled anew for every batch's
            features["text_index"] = [text.place for text in inputs]
        return features

    @compat.overrides
    def forward(self, input: dict[str, Any], packed: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As ``SentenceTransformer.forward``.

        Args:
            input: the features of a batch, as :meth:`preprocess` makes them.
            packed: leave padding out where that gives the same faster: see docs/packed.md.
        """
        places = input.pop("text_index", None)
        if packed and self._packs():
            input["packed"] = True
        try:
            output = super().forward(input, **kwargs)
        except NonFiniteLogitsError as error:
            raise self._naming_the_text(error, input, places, kwargs) from error
        output.pop("packed", None)
        return output

    def _packs(self) -> bool:
        """Whether attention without padding gives the same, and is faster."""
        encoder = self.transformers_model
        dtype, kind = encoder.dtype, self.device.type
        faster = kind == "cpu" or attention_kernel(kind, dtype) != "sdpa"
        # A compiled model is one graph of padded batches; only "eager" makes attention weights.
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
        """The error with the index of the first text of the batch that it is true of."""
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

    def _encode_by_domain(
        self, texts: list[Any], domains: list[str], kwargs: dict[str, Any]
    ) -> Any:
        """One call per domain, its results put back where its texts stood."""
        precision = kwargs.get("precision") or "float32"
        if precision != "float32":  # its ranges are those of all texts, not of one domain's
            options = kwargs | {"precision": "float32"}
            vectors = self._encode_by_domain(texts, domains, options)
            codes = quantize_embeddings(vectors, precision=precision)
            if isinstance(vectors, np.ndarray):
                return codes
            codes = torch.as_tensor(codes)
            return codes if isinstance(vectors, torch.Tensor) else list(codes)
        places: list[int] = []
        parts = []
        for name in sorted(set(domains)):
            here = [i for i, d in enumerate(domains) if d == name]
            places += here
            parts.append(super().encode([texts[i] for i in here], domain=name, **kwargs))
        order = np.argsort(places)
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)[order]
        flat = [item for part in parts for item in part]
        return [flat[i] for i in order]

    def _checked_domain(self, domain: Any, num_texts: int) -> str | list[str] | None:
        """``domain`` as one name, a list with one name per text, or ``None``."""
        config = self.transformers_model.config
        domain = _domain_of_the_card.get() if domain is None else domain
        if domain is None:
            if config.routing == "enforced" and config.default_domain is None:
                raise ValueError(
                    "domain must be given: the model routes by domain and has no default_domain. "
                    f"Known domains: {', '.join(config.domains) or 'none'}; got None."
                )
            return None
        if isinstance(domain, str):
            config.domain_id(domain)
            return domain
        names = None if isinstance(domain, (Mapping, Set, bytes)) else _as_list(domain)
        if names is None or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"domain must be a name (str) or a sequence of names, one per text; got {domain!r}."
            )
        if len(names) != num_texts:
            raise ValueError(
                f"domain must be one name or one per text; got {len(names)} names for "
                f"{num_texts} texts."
            )
        for name in dict.fromkeys(names):
            config.domain_id(name)
        return names

    @compat.overrides
    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As ``SentenceTransformer.save``, but whole or not at all.

        An old model in ``path`` stays until the new one takes its place in one step; files of
        others are kept, as in :func:`moe_fast.files.atomic_folder`.
        """
        if path is None:  # nothing to do, as for the stock class
            return
        with atomic_folder(path, replaces=replaced_files(self.transformers_model)) as temporary:
            super().save(str(temporary), model_name, create_model_card, *args, **kwargs)
            if not create_model_card:  # the encoder, which lies in the same folder, has its own
                Path(temporary, "README.md").unlink(missing_ok=True)
        self.model_card_data.save_dir = str(path)

    @compat.overrides
    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As sentence-transformers', with a section that says how the mixture was made."""
        model = self.transformers_model
        domain = model.config.default_domain
        if domain is None and model.config.routing == "enforced" and model.config.domains:
            domain = model.config.domains[0]
        with _default_domain(domain):
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


# Of calls that name none, within a thread.
_domain_of_the_card: ContextVar[str | None] = ContextVar("moe_fast_card_domain", default=None)


@contextmanager
def _default_domain(domain: str | None) -> Iterator[None]:
    """Let sentence-transformers run its usage example on a model that needs a domain."""
    token = _domain_of_the_card.set(domain)
    try:
        yield
    finally:
        _domain_of_the_card.reset(token)


def _with_usage(card: str, domain: str | None) -> str:
    """sentence-transformers' usage example, made to run on a mixture."""
    load = "from sentence_transformers import SentenceTransformer\n"
    register = f"import moe_fast  # registers the architecture: {install_command('train')}\n"
    if register not in card:
        card = card.replace(load, register + load, 1)
    if domain is None:
        return card
    call = r"(model\.encode\w*\(\w+)\)"
    return re.sub(call, lambda match: f"{match[1]}, domain={domain!r})", card)


def _as_list(values: Any) -> list[Any] | None:
    """``values`` as a list; ``None`` for what cannot be gone through."""
    try:
        return list(values)
    except TypeError:
        return None


def load_sentence_transformer(path: str, device: str | None = "cpu") -> SentenceTransformer:
    """The stock ``SentenceTransformer`` in a folder or under a hub id.

    Raises:
        ValueError: for weights that its encoder lacks, which would be made up.
        TypeError: for a model of several encoders.
    """
    with naming(path):
        model = SentenceTransformer(path, device=device)
    check_one_encoder(model)
    encoder = model.transformers_model
    if encoder is not None and not compat.saves_adapter_alone(encoder):
        modules = compat.file_of(path, "modules.json")
        folder = read_modules(Path(modules))[0][0] if modules else ""
        with naming(path):
            check_encoder_weights(encoder, path, folder)
    return model


def upcycle_sentence_transformer(
    model: SentenceTransformer, **settings: Any
) -> MoESentenceTransformer:
    """What :func:`moe_fast.upcycle` does with a ``SentenceTransformer``."""
    settings = _completed(model, settings)
    return _with_encoder(MoESentenceTransformer, model, upcycle(_encoder(model), **settings))


def join_sentence_transformers(
    models: Sequence[SentenceTransformer], *, shared: str, **settings: Any
) -> MoESentenceTransformer:
    """What :func:`moe_fast.from_experts` does with several ``SentenceTransformer``s.

    Modules behind the encoder that have weights (``Dense``) follow ``shared``.
    """
    first = models[0]
    encoders = [_encoder(model) for model in models]
    for i, model in enumerate(models[1:], 1):
        _check_same_pipeline(first, model, i)
    check_same_tokenizers([model.tokenizer for model in models])
    settings = _completed(first, settings)
    joined = _with_encoder(
        MoESentenceTransformer, first, join_encoders(encoders, shared=shared, **settings)
    )
    if shared == "mean":
        for name in list(compat.child_modules(first))[1:]:
            states = [model.get_submodule(name).state_dict() for model in models]
            joined.get_submodule(name).load_state_dict(mean_state(states))
    return joined


def _completed(model: SentenceTransformer, settings: dict[str, Any]) -> dict[str, Any]:
    """upcycle's settings, with what a ``SentenceTransformer`` knows or needs."""
    if settings["routing"] == "enforced" and not settings["domains"]:
        raise ValueError(
            "domains must be given with routing='enforced' for a SentenceTransformer, whose encode "
            "chooses the expert by domain; got none."
        )
    if settings.get("cls_token_id") is None and model.tokenizer is not None:
        settings = {**settings, "cls_token_id": model.tokenizer.cls_token_id}
    return settings


def _check_same_pipeline(first: SentenceTransformer, other: SentenceTransformer, i: int) -> None:
    """All but the weights must agree, or what differs would be dropped unseen."""
    want, have = _pipeline(first), _pipeline(other)
    differences = [
        f"{name}: {have.get(name)!r} instead of {want.get(name)!r}"
        for name in sorted({*want, *have})
        if want.get(name) != have.get(name)
    ]
    if differences:
        raise ValueError(
            f"models must differ in their weights alone; model {i} differs from model 0 in "
            f"{'; '.join(differences)}."
        )


def _pipeline(model: SentenceTransformer) -> dict[str, Any]:
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    settings = {name: getattr(model, name) for name in (*names, "max_seq_length")}
    for i, module in enumerate(model):
        settings[f"module {i}"] = type(module).__name__
        if hasattr(module, "get_config_dict"):
            config = module.get_config_dict()
            settings.update((f"module {i}'s {key}", value) for key, value in config.items())
    return settings


def with_mapped_encoder(
    model: SentenceTransformer, change: Callable[[Any], nn.Module]
) -> MoESentenceTransformer:
    """A copy of a mixture whose encoder is ``change`` of the old one."""
    new = _with_encoder(MoESentenceTransformer, model, change(_encoder(model)))
    new.truncate = getattr(model, "truncate", False)
    new.packed = getattr(model, "packed", True)
    return new


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
    check_one_encoder(model)
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, nn.Module) or encoder is not model.transformers_model:
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
    modules = OrderedDict(copy.deepcopy(compat.child_modules(model), {id(old): old}))
    first = next(iter(modules.values()))
    first.model = encoder
    compat.forwards_names(first, ("expert_ids", "domain", "domain_ids"))
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
