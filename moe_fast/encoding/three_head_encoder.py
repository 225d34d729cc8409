"""Encoders with dense, sparse and multi-vector output: ThreeHeadEncoder, MoEThreeHeadEncoder."""

from __future__ import annotations

import inspect
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_fast.extras import missing

try:
    import scipy  # noqa: F401  of the sparse output
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling
except ImportError as error:
    raise missing("sentence_transformers", "train", "ThreeHeadEncoder", error) from error

from torch import Tensor, nn

from moe_fast import compat
from moe_fast.architectures import setting
from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.domains import checked_domain
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.head_files import (
    COLBERT,
    REPLACED,
    SPARSE,
    read_heads,
    write_bge_m3_heads,
    write_heads,
)
from moe_fast.encoding.head_outputs import HeadOutputs, lexical_rows
from moe_fast.encoding.lengths import TokenizedText, prompt_length, tokenize_texts
from moe_fast.encoding.model_card import use_domain
from moe_fast.encoding.model_paths import has_modules
from moe_fast.encoding.prompts import prompt_of
from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
from moe_fast.encoding.three_heads import OUTPUTS, ThreeHeads
from moe_fast.files import atomic_folder
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import architecture_of
from moe_fast.models.saving import replaced_files
from moe_fast.ops.checks import check_choice, check_count

# Weights of an earlier save, which must not outlive a new one.
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")

_OPTIONS = {"domain", "prompt", "prompt_name", "batch_size", "truncate", "packed"}
_STOCK = inspect.signature(SentenceTransformer.encode).parameters


class ThreeHeadPipeline:
    """Stands before sentence-transformers' class, or ours, in the bases of both encoders.

    The heads are the last module. They are not listed in a saved ``modules.json``; their files are
    beside it. So the stock class loads the dense part, as it does for BGE-M3.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_overrides(type(self))
        path = args[0] if args else kwargs.get("model_name_or_path")
        path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        if path is not None:
            check_checkpoint(path)
            if not has_modules(path):  # as FlagEmbedding saves a model
                kwargs = {**kwargs, "modules": _published_modules(path, kwargs)}
                kwargs.pop("model_name_or_path", None)
                args = args[1:]
        super().__init__(*args, **kwargs)
        model: Any = self
        check_one_encoder(model)
        self.head_file_dtypes: dict[str, torch.dtype] = {}
        if not any(isinstance(module, ThreeHeads) for module in model):
            if path is None:
                raise TypeError(
                    f"{type(self).__name__} needs ThreeHeads as its last module, or a folder with "
                    "the files of heads; make one with moe_fast.add_three_heads(model)."
                )
            self._append_heads(path)

    def _append_heads(self, path: str) -> None:
        model: Any = self
        sparse, colbert = read_heads(path, model.transformers_model.config.hidden_size)
        heads = ThreeHeads(colbert["weight"].shape[1], colbert["weight"].shape[0])
        parameter = next(model.parameters())
        heads.to(parameter.device, parameter.dtype)
        heads.sparse_linear.load_state_dict(sparse)
        heads.colbert_linear.load_state_dict(colbert)
        heads.on_model_ready(model)
        model.append(heads)
        self.head_file_dtypes = {SPARSE: sparse["weight"].dtype, COLBERT: colbert["weight"].dtype}

    @property
    def heads(self) -> ThreeHeads:
        """The module with the lexical and the multi-vector layer."""
        return next(module for module in self if isinstance(module, ThreeHeads))

    @compat.overrides
    def encode(
        self,
        inputs: Any = None,
        *args: Any,
        outputs: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode texts by the dense head as the base class does, or by the heads that are named.

        Args:
            inputs: a text or a sequence of texts.
            outputs: which of "dense", "sparse" and "multi_vector" to compute, in one forward pass
                per batch. ``None``: the dense vectors, with the arguments and the result of the
                base class's ``encode``.
            **kwargs: with ``outputs``: ``domain`` (of a mixture: for all texts or one per text),
                ``prompt``, ``prompt_name``, ``batch_size`` (32), ``truncate`` (cut texts that are
                longer than ``max_seq_length``, and warn, instead of raising), and ``packed`` (of a
                mixture).

        Returns:
            :class:`moe_fast.encoding.head_outputs.HeadOutputs` if ``outputs`` is given; a single
            text is then a sequence of one.

        Raises:
            ValueError: an unknown output, texts that are too long, an unknown domain, or a text
                with NaN or infinite results, which is named.
            TypeError: an argument that ``outputs`` does not go with, or a text that is no string.
        """
        if outputs is None:
            return super().encode(inputs, *args, **kwargs, outputs=("dense",))
        if args:
            raise TypeError("with outputs, all arguments but the texts must be given by name.")
        options = _without_stock_defaults(kwargs)
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        if not names:
            raise ValueError(f"outputs must name at least one of {', '.join(OUTPUTS)}; got none.")
        for name in names:
            check_choice("outputs", name, OUTPUTS)
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts must be strings; text {i} is a {type(text).__name__}.")
        return self._encode_heads(texts, tuple(names), **options)

    def _encode_heads(
        self,
        texts: list[str],
        outputs: tuple[str, ...],
        *,
        domain: str | Sequence[str] | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
        truncate: bool | None = None,
        packed: bool | None = None,
    ) -> HeadOutputs:
        check_count("batch_size", batch_size)
        model: Any = self
        domains = self._domains(domain, len(texts))
        prompt = prompt_of(model, prompt, prompt_name)
        limit = model.max_seq_length
        tokenized, long = tokenize_texts(model.tokenizer, texts, prompt, limit)
        long.settle(getattr(model, "truncate", False) if truncate is None else truncate)
        options: dict[str, Any] = {"outputs": outputs}
        if isinstance(model, MoESentenceTransformer):
            options["packed"] = model.packed if packed is None else packed
        if isinstance(domains, str):
            options["domain"] = domains
        shared = {}
        if prompt:
            shared["prompt_length"] = prompt_length(model.tokenizer, prompt, limit)
        collected = _Collected(len(texts), outputs)
        order = sorted(range(len(texts)), key=lambda i: -len(tokenized[i].ids))
        was_training = model.training
        if was_training:
            model.eval()
        try:
            with torch.inference_mode():
                for start in range(0, len(order), batch_size):
                    batch = [tokenized[i] for i in order[start : start + batch_size]]
                    features = self._features(batch, domains) | shared
                    collected.add([text.place for text in batch], model(features, **options))
        finally:
            if was_training:
                model.train()
        return collected.result(model.transformers_model.config.vocab_size, self._sizes())

    def _domains(self, domain: Any, num_texts: int) -> str | list[str] | None:
        """The checked domain or domains; dense models take none."""
        config = self.transformers_model.config
        if isinstance(self.transformers_model, MoEPreTrainedModel):
            return checked_domain(config, use_domain(domain), num_texts)
        if domain is not None:
            raise TypeError(f"a dense model has no domains; got domain={domain!r}.")
        return None

    def _features(self, batch: list[TokenizedText], domains: Any) -> dict[str, Any]:
        """The features of a batch, on the model's device."""
        model: Any = self
        features: dict[str, Any] = padded_batch(batch, model.tokenizer)
        if isinstance(domains, list):
            config = model.transformers_model.config
            ids = [config.domain_id(domains[text.place]) for text in batch]
            features["domain_ids"] = torch.tensor(ids)
        features = {name: value.to(model.device) for name, value in features.items()}
        features["modality"] = "text"
        if isinstance(model, MoESentenceTransformer) and not compat.is_compiled(model):
            features["text_index"] = [text.place for text in batch]
        return features

    def _sizes(self) -> tuple[int, int]:
        model: Any = self
        return model.get_embedding_dimension(), self.heads.multi_vector_dim

    def multi_vector_encoder(self) -> MultiVectorEncoder:
        """The multi-vector part as sentence-transformers' ``MultiVectorEncoder``.

        It shares this model's encoder and layer, and can be saved as a model of its own, which the
        stock class loads. Its similarity is "meanmaxsim". Its mask leaves out the tokenizer's CLS
        token wherever it is, this model the first token of each text: the same, unless a text
        contains the CLS token's name.

        Raises:
            ValueError: the tokenizer has no CLS token.
        """
        model: Any = self
        tokenizer, layer = model.tokenizer, self.heads.colbert_linear
        if tokenizer.cls_token is None:
            raise ValueError(
                "a MultiVectorEncoder leaves out the first token by its name, and this model's "
                "tokenizer has no cls_token."
            )
        dense = Dense(
            layer.in_features,
            layer.out_features,
            activation_function=nn.Identity(),
            module_input_name="token_embeddings",
        )
        dense.linear = layer
        mask = MultiVectorMask([tokenizer.cls_token], skiplist_tasks=["query", "document"])
        modules = [model[0], dense, mask, Normalize(module_input_name="token_embeddings")]
        encoder = MultiVectorEncoder(
            modules=modules,
            device=str(model.device),
            prompts=dict(model.prompts),
            default_prompt_name=model.default_prompt_name,
            similarity_fn_name="meanmaxsim",
        )
        names = (model.module_kwargs or {}).get(next(iter(compat.child_modules(model))), [])
        encoder.module_kwargs = {"0": list(names)}
        return encoder.train(model.training)

    @compat.overrides
    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        *args: Any,
        bge_m3_files: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the base class's, with the heads' files beside ``modules.json``; atomic.

        Args:
            bge_m3_files: also write ``sparse_linear.pt`` and ``colbert_linear.pt``, as other
                programs read them.
        """
        if path is None:  # nothing to do, as for the stock class
            return
        model: Any = self
        heads = self.heads
        encoder = model.transformers_model
        mixture = isinstance(encoder, MoEPreTrainedModel)
        replaces = (*(replaced_files(encoder) if mixture else _WEIGHTS), *REPLACED)
        with atomic_folder(path, replaces=replaces) as temporary:
            super().save(str(temporary), model_name, create_model_card, *args, **kwargs)
            _unlist_heads(temporary)
            write_heads(temporary, heads.sparse_linear, heads.colbert_linear)
            if bge_m3_files:
                layers = (heads.sparse_linear, heads.colbert_linear)
                write_bge_m3_heads(temporary, *layers, self.head_file_dtypes)
        model.model_card_data.save_dir = str(path)

    @compat.overrides
    def save_pretrained(self, path: str, *args: Any, **kwargs: Any) -> None:
        """The same as :meth:`save`."""
        self.save(path, *args, **kwargs)


class ThreeHeadEncoder(ThreeHeadPipeline, SentenceTransformer):
    """A ``SentenceTransformer`` with a lexical and a multi-vector head, such as BGE-M3.

    Constructor and methods are those of ``SentenceTransformer``; ``encode`` also takes ``outputs``.
    It loads folders in BGE-M3's format, also without a ``modules.json``: then the dense vector is
    the normalised first token, as published. :func:`moe_fast.add_three_heads` adds heads to another
    model.
    """

    model_type = "SentenceTransformer"  # what is saved opens as one


class MoEThreeHeadEncoder(ThreeHeadPipeline, MoESentenceTransformer):
    """As :class:`moe_fast.ThreeHeadEncoder`, with a mixture of experts as its encoder.

    Constructor and methods are those of :class:`moe_fast.MoESentenceTransformer`; ``encode`` also
    takes ``outputs``. :func:`moe_fast.upcycle` makes one of a :class:`moe_fast.ThreeHeadEncoder`.
    """


def add_three_heads(
    model: Any, *, multi_vector_dim: int | None = None, seed: int = 0
) -> ThreeHeadEncoder | MoEThreeHeadEncoder:
    """Make an encoder with three heads from a SentenceTransformer, dense or a mixture.

    Args:
        model: a ``SentenceTransformer`` or ``MoESentenceTransformer`` with one text encoder. The
            result shares its modules.
        multi_vector_dim: D', the size of a token's vector; ``None``: that of the hidden states.
        seed: of the new layers, see :class:`moe_fast.encoding.three_heads.ThreeHeads`.

    Raises:
        TypeError: the model is no SentenceTransformer with one encoder, or has heads already.
    """
    if isinstance(model, ThreeHeadPipeline) or not isinstance(model, SentenceTransformer):
        raise TypeError(
            "model must be a SentenceTransformer or MoESentenceTransformer without heads; got "
            f"{type(model).__name__}."
        )
    check_one_encoder(model)
    size = model.transformers_model.config.hidden_size
    heads = ThreeHeads(size, size if multi_vector_dim is None else multi_vector_dim, seed=seed)
    mixture = isinstance(model.transformers_model, MoEPreTrainedModel)
    modules = OrderedDict(compat.child_modules(model))
    modules[str(len(modules))] = heads
    new: Any = (MoEThreeHeadEncoder if mixture else ThreeHeadEncoder)(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    new.module_kwargs = {**(model.module_kwargs or {}), **(new.module_kwargs or {})}
    return new.train(model.training)


def _without_stock_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out the stock class's options that have their default, as ``encode_query`` gives them.

    Raises:
        TypeError: for any other option that does not go with ``outputs``.
    """
    kept = {}
    for name, value in options.items():
        if name in _OPTIONS:
            kept[name] = value
        elif name != "task" and (name not in _STOCK or value != _STOCK[name].default):
            raise TypeError(
                f"with outputs, encode takes {', '.join(sorted(_OPTIONS))}; got {name}={value!r}."
            )
    return kept


class _Collected:
    """Collects the outputs of batches in any order."""

    def __init__(self, num_texts: int, outputs: tuple[str, ...]) -> None:
        self._outputs = outputs
        self._dense: list[Any] = [None] * num_texts
        self._vectors: list[Any] = [None] * num_texts
        self._tokens: list[tuple[Any, Any, Any]] = []

    def add(self, places: list[int], features: dict[str, Any]) -> None:
        """Take the outputs of the texts at these places."""
        if "dense" in self._outputs:
            rows = _finite(features["sentence_embedding"], places)
            for place, row in zip(places, rows, strict=True):
                self._dense[place] = row
        if "multi_vector" in self._outputs:
            mask = features["multi_vector_mask"]
            lengths = mask.sum(1).tolist()
            owners = np.repeat(places, lengths)
            rows = _finite(features["multi_vectors"][mask], owners)
            parts = np.split(rows, np.cumsum(lengths)[:-1])
            for place, part in zip(places, parts, strict=True):
                self._vectors[place] = part
        if "sparse" in self._outputs:
            mask = features["lexical_mask"]
            owners = np.repeat(places, mask.sum(1).tolist())
            weights = _finite(features["token_logits"][mask], owners).clip(min=0)
            self._tokens.append((owners, features["input_ids"][mask].cpu().numpy(), weights))

    def result(self, vocab_size: int, sizes: tuple[int, int]) -> HeadOutputs:
        """The outputs of all texts, in their order."""
        dense = sparse = multi = None
        if "dense" in self._outputs:
            empty = np.zeros((0, sizes[0]), np.float32)
            dense = np.stack(self._dense) if self._dense else empty
        if "multi_vector" in self._outputs:
            multi = self._vectors
        if "sparse" in self._outputs:
            empty_tokens = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
            columns = zip(*(self._tokens or [empty_tokens]), strict=True)
            owners, ids, weights = (np.concatenate(column) for column in columns)
            sparse = lexical_rows(owners, ids, weights, len(self._dense), vocab_size)
        return HeadOutputs(dense, sparse, multi)


def _finite(values: Tensor, owners: Any) -> Any:
    """As a float32 array; ``ValueError`` names the text (``owners[row]``) of a NaN or infinity."""
    array = values.float().cpu().numpy()
    good = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if not good.all():
        place = int(owners[int(np.flatnonzero(~good)[0])])
        raise ValueError(f"the model gives NaN or infinite numbers for text {place}.")
    return array


def _unlist_heads(folder: Path) -> None:
    """Take the heads out of a saved ``modules.json``, whose stock class could not load them."""
    file = folder / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8"))
    kept = []
    for module in modules:
        if module["type"].rpartition(".")[2] != ThreeHeads.__name__:
            kept.append(module)
        elif (place := folder / module["path"]) != folder and place.is_dir():
            place.rmdir()  # empty: the heads write nothing there
    file.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def _published_modules(path: str, options: dict[str, Any]) -> Iterable[nn.Module]:
    """BGE-M3's modules around a bare encoder: its first token's hidden state, normalised."""
    names = ("model_kwargs", "processor_kwargs", "config_kwargs")
    given = {name: options[name] for name in names if options.get(name) is not None}
    encoder = Transformer(path, **given)
    most = _most_tokens(encoder.model)
    if most is not None and (encoder.max_seq_length or most) >= most:
        encoder.max_seq_length = most
    return [encoder, Pooling(encoder.get_embedding_dimension(), "cls"), Normalize()]


def _most_tokens(encoder: Any) -> int | None:
    """The number of tokens for which the encoder has positions; ``None``: not known.

    RoBERTa's kin number positions from behind the padding's id: 8,194 of them hold 8,192 tokens.
    """
    positions = getattr(encoder.config, "max_position_embeddings", None)
    try:
        padding = setting(encoder.config, architecture_of(encoder).padding_id)
    except TypeError:  # an encoder that is not in our table
        return None
    return positions if positions is None or padding is None else positions - padding - 1
