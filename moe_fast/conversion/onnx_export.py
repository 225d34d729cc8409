"""export_onnx: writes a model as an ONNX file that is checked before it is put in place.

The graph has plain operators alone: experts are gathers and products
(:mod:`moe_fast.layers.plain_experts`), attention is written out. It contains everything behind the
tokenizer, pooling and normalisation too, and takes any numbers of texts and tokens.
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_fast.conversion.extract import extract_expert
from moe_fast.conversion.input_model import loaded
from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.lengths import counted_truncation, tokenize_texts
from moe_fast.encoding.onnx_encoder import (
    DOMAIN_IDS,
    MODEL,
    OUTPUT,
    OnnxEncoder,
    OnnxSettings,
)
from moe_fast.encoding.plain_text import why_not_plain
from moe_fast.extras import require
from moe_fast.files import atomic_folder, check_output
from moe_fast.layers.plain_experts import to_plain_experts
from moe_fast.models.configuration import AUTO
from moe_fast.models.domain_predictor import (
    DomainPredictor,
    in_order_of_domains,
    predicted_domains,
)
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.quantization import check_not_quantized
from moe_fast.models.routing_inputs import place_domain_tokens
from moe_fast.models.saving import check_no_adapter
from moe_fast.ops.checks import check_choice
from moe_fast.version import __version__

TOLERANCE = 1e-4
"""The most by which a vector may differ from the model's, relative to its length."""
_OPSET = 17  # the first with LayerNormalization
_MOST_TOKENS = 128  # of the texts that the file is checked with


def export_onnx(
    model_or_path: Any,
    output: str | os.PathLike[str],
    *,
    domain: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as ONNX, with its tokenizer, for :class:`moe_fast.OnnxEncoder`.

    The file is run in ONNX Runtime before it is put in place: new texts of many lengths, of all
    domains, must give the model's own vectors to 1e-4 of their length. It computes in float32, in
    which all weights of float16 and bfloat16 are exact.

    Args:
        model_or_path: a ``SentenceTransformer``, a mixture or dense, or its folder or hub id.
        output: the folder to write: the graph, its settings and the tokenizer.
        domain: with enforced routing, the one domain to fold in: the result is dense, and takes no
            domain. ``None``: the graph has all experts, and takes the domain of each text.
        overwrite: whether a folder that exists there may be replaced.

    Returns:
        ``output``.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        TypeError: for a model without ``encode``, such as a bare encoder.
        ValueError: for what cannot be exported: three heads, sparse vectors, adapters, 8-bit
            integers, poolings that leave out the prompt, tokenizers with settings of their own;
            for a ``domain`` that is unknown, or that a learned router has no expert for.
        FileExistsError: ``output`` exists.
        RuntimeError: the written file does not give the model's vectors; nothing is put in place.
    """
    for library in ("onnx", "onnxruntime"):
        require(library, "onnx", "export_onnx")
    path = check_output(output, overwrite)
    model = _checked(loaded(model_or_path).pipeline, model_or_path)
    encoder = model.transformers_model
    if domain is not None:
        _check_folded(encoder, domain)
        model = extract_expert(model, domain)
    model = _in_float32(model)
    settings = _settings(model)
    with atomic_folder(path, replaces=("*",)) as folder:
        with _without_chatter():
            _write_graph(_Network(_plain_copy(model), settings), folder / MODEL)
        settings.write(folder)
        model.tokenizer.save_pretrained(str(folder))
        with counted_truncation():  # the texts are the check's own
            _compare(model, OnnxEncoder(folder, truncate=True))
    return path


# --- what can be exported ------------------------------------------------------------------------


def _checked(pipeline: Any, model_or_path: Any) -> Any:
    """The pipeline, if it can be exported; errors as those of :func:`export_onnx`."""
    if not hasattr(pipeline, "encode"):
        kind = type(pipeline if pipeline is not None else model_or_path).__name__
        raise TypeError(
            "model_or_path must be a SentenceTransformer, whose pooling is exported with the "
            f"encoder, or the path of one; got {'a bare encoder' if kind == 'str' else kind}."
        )
    kind = getattr(pipeline, "model_type", type(pipeline).__name__)
    from moe_fast.encoding.three_head_encoder import ThreeHeadPipeline

    if kind != "SentenceTransformer" or isinstance(pipeline, ThreeHeadPipeline):
        raise ValueError(
            "model_or_path must be a SentenceTransformer with one vector per text; got "
            f"{type(pipeline).__name__}."
        )
    encoder = pipeline.transformers_model
    check_no_adapter(encoder)
    check_not_quantized(encoder, "exported to ONNX (onnxruntime.quantization makes one of 8 bits)")
    reason = why_not_plain(pipeline)
    if reason is not None:
        raise ValueError(f"the model cannot be exported to ONNX: {reason}.")
    if any(not getattr(module, "include_prompt", True) for module in pipeline):
        raise ValueError(
            "the model cannot be exported to ONNX: its pooling leaves out the prompt "
            "(include_prompt=False), whose length the graph does not know."
        )
    if getattr(encoder.config, "route_by_token_type", False):
        raise ValueError(
            "the model cannot be exported to ONNX: it routes by token types "
            "(route_by_token_type=True), which its tokenizer does not give."
        )
    return pipeline


def _check_folded(encoder: Any, domain: str) -> None:
    if not isinstance(encoder, MoEPreTrainedModel):
        raise ValueError(f"domain must be None for a dense model; got {domain!r}.")
    config = encoder.config
    if config.routing != "enforced":
        raise ValueError(
            f"domain must be None with routing={config.routing!r}, whose domains have no expert of "
            f"their own: OnnxEncoder.encode takes the domain of each text; got {domain!r}."
        )
    check_choice("domain", domain, config.domains)


def _in_float32(model: Any) -> Any:
    """The model, in evaluation mode on the CPU; a copy if it is in another state."""
    state = {(p.dtype, p.device.type) for p in model.parameters()}
    if state == {(torch.float32, "cpu")} and not model.training:
        return model
    return copy.deepcopy(model).float().cpu().eval()


def _settings(model: Any) -> OnnxSettings:
    config = model.transformers_model.config
    domains = list(getattr(config, "domains", None) or ())
    known = predicted_domains(config) if domains else []
    predicts = bool(domains) and set(domains) <= set(known)
    (text,), _ = tokenize_texts(model.tokenizer, ["a text"], "", model.max_seq_length)
    inputs = list(padded_batch([text], model.tokenizer))
    return OnnxSettings(
        inputs=[*inputs, DOMAIN_IDS] if domains else inputs,
        dimension=_dimension(model),
        max_seq_length=model.max_seq_length,
        prompts=dict(model.prompts or {}),
        default_prompt_name=model.default_prompt_name,
        truncate_dim=model.truncate_dim,
        routing=getattr(config, "routing", "dense"),
        domains=domains,
        default_domain=getattr(config, "default_domain", None),
        predicts_domain=predicts,
        made_by=f"moe_fast {__version__}",
    )


def _dimension(model: Any) -> int:
    """The elements of a vector before ``truncate_dim`` cuts it."""
    last = [m.get_embedding_dimension() for m in model if hasattr(m, "get_embedding_dimension")]
    return int(last[-1])


# --- the graph -----------------------------------------------------------------------------------


class _Network(nn.Module):
    """A SentenceTransformer as a function of the graph's inputs."""

    def __init__(self, model: Any, settings: OnnxSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, *arrays: Tensor) -> Tensor:
        """Embed a padded batch: arrays [B, L] and, with domains, [B], to [B, d]."""
        features: dict[str, Any] = dict(zip(self.settings.inputs, arrays, strict=True))
        if DOMAIN_IDS in features:
            self._place_domains(features)
        features["modality"] = "text"
        for module in self.model:
            features = module(features)
        return features[OUTPUT]

    def _place_domains(self, features: dict[str, Any]) -> None:
        """Resolve the ids that are no domain's: :class:`OnnxSettings` says what they mean."""
        config = self.model.transformers_model.config
        ids, mask = features["input_ids"], features.get("attention_mask")
        domains = features[DOMAIN_IDS]
        if self.settings.predicts_domain:
            predictor = self.model.transformers_model.domain_predictor
            predicted = in_order_of_domains(config, _domain_logits(predictor, ids, mask)).argmax(1)
            domains = torch.where(domains == len(self.settings.domains), predicted, domains)
        if config.routing == "enforced":
            features[DOMAIN_IDS] = domains
            return
        del features[DOMAIN_IDS]
        placed = place_domain_tokens(config, ids, domains.clamp(min=0), mask, None)
        assert placed is not None
        features["input_ids"] = torch.where(domains[:, None] >= 0, placed, ids)


def _domain_logits(predictor: DomainPredictor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """As the predictor's forward, for a padded batch [B, L]: [B, C]."""
    scores = F.embedding(ids.clamp(max=predictor.weight.shape[0] - 1), predictor.weight)
    real = torch.ones_like(ids) if mask is None else mask
    share = real.to(scores.dtype) / real.sum(1, keepdim=True).to(scores.dtype)
    return (scores * share[..., None]).sum(1) + predictor.bias


def _plain_copy(model: Any) -> Any:
    """A copy of plain operators, which shares the weights."""
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    encoder = plain.transformers_model
    to_plain_experts(encoder)
    # ONNX Runtime embeds faster with attention written out than with PyTorch's own function
    # translated; see bench/runtimes.py.
    encoder.set_attn_implementation("eager")
    if isinstance(encoder, MoEPreTrainedModel):
        encoder.config.fused_output = False
        encoder.config.default_domain = None  # OnnxEncoder passes it
    return plain


@torch.no_grad()
def _write_graph(network: _Network, path: Path) -> None:
    """Trace the network and write it.

    ``dynamo=False``, because torch's newer exporter takes minutes where the work of each expert
    depends on the data, for a graph that ONNX Runtime computes no faster; see docs/decisions.md.
    """
    settings = network.settings
    texts = ["a text", "a text that has some more words"]
    tokenizer = network.model.tokenizer
    tokenized, _ = tokenize_texts(tokenizer, texts, "", settings.max_seq_length)
    arrays = padded_batch(tokenized, tokenizer)
    sizes: dict[str, dict[int, str]] = {name: {0: "texts", 1: "tokens"} for name in arrays}
    if DOMAIN_IDS in settings.inputs:
        arrays[DOMAIN_IDS] = torch.arange(len(texts)) % len(settings.domains)
        sizes[DOMAIN_IDS] = {0: "texts"}
    torch.onnx.export(
        network.eval(),
        tuple(arrays.values()),
        path,
        dynamo=False,
        opset_version=_OPSET,
        input_names=settings.inputs,
        output_names=[OUTPUT],
        dynamic_axes=sizes | {OUTPUT: {0: "texts"}},
    )


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Silence the exporter's warnings, such as that it traces, and its prints."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield


# --- the check -----------------------------------------------------------------------------------


def _compare(model: Any, exported: OnnxEncoder) -> None:
    """Raise ``RuntimeError`` unless the exported model gives the model's vectors."""
    texts = _new_texts(model.tokenizer, model.max_seq_length)
    for domain in _domains_to_check(exported.settings):
        options: dict[str, Any] = {} if domain is None else {"domain": domain}
        found = exported.encode(texts, batch_size=4, **options)
        if hasattr(model, "truncate"):  # ours; the stock class cuts texts unasked
            options["truncate"] = True
        expected = model.encode(texts, show_progress_bar=False, **options)
        lengths = np.linalg.norm(expected, axis=1)
        differences = np.linalg.norm(found - expected, axis=1) / np.maximum(lengths, 1e-12)
        worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
        if not differences[worst] <= TOLERANCE:
            said = "" if domain is None else f" of domain {domain!r}"
            raise RuntimeError(
                f"the exported model must give the model's vectors to {TOLERANCE:g} of their "
                f"length; text {worst} of {len(texts)}{said} differs by {differences[worst]:.1e}. "
                "Nothing is written."
            )


def _domains_to_check(settings: OnnxSettings) -> list[str | None]:
    found: list[str | None] = list(settings.domains)
    if settings.predicts_domain:
        found.append(AUTO)
    if not found or settings.default_domain is not None or settings.routing != "enforced":
        found.append(None)
    return found


def _new_texts(tokenizer: Any, limit: int | None) -> Sequence[str]:
    """Texts of tokens drawn from the vocabulary: each of another length, the longest cut."""
    draw = random.Random(0)
    special = set(tokenizer.all_special_ids)
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - special)
    most = min(limit or _MOST_TOKENS, _MOST_TOKENS)
    counts = [*range(1, 9), *(most * i // 8 for i in range(1, 10))]
    drawn = [draw.choices(vocabulary, k=count) for count in counts]
    return [tokenizer.decode(ids) for ids in drawn]
