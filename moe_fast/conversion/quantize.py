"""quantize: makes a mixture whose layers multiply 8-bit integers, for inference on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from moe_fast.conversion.input_model import Given, loaded, mixture_of
from moe_fast.layers.int8 import Int8Matrix
from moe_fast.models.lora import check_full
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.quantization import METHODS, freeze, quantize_layers
from moe_fast.ops.checks import check_choice


def quantize(
    model_or_path: Any,
    method: str = "int8",
    *,
    texts: Sequence[str] | None = None,
    domain: str | Sequence[str] | None = None,
) -> Any:
    """Make a mixture whose layers multiply 8-bit integers: smaller, and faster on a CPU.

    The weights of the experts and of all linear maps beside them (queries, keys, values, the
    attention's output, dense MLPs) become 8-bit integers with a scale per output channel. Their
    inputs are rounded to 8 bits as they come. Everything else stays float32: embeddings, norms,
    the residual stream, softmax, router, and the layers behind the encoder. docs/int8.md has
    measurements.

    Args:
        model_or_path: a mixture, bare or with a head; a ``MoESentenceTransformer``,
            ``MoESparseEncoder`` or ``MoECrossEncoder``; or the folder or hub id of one.
        method: "int8". "float8" is refused: no processor multiplies 8-bit floating numbers.
        texts: sample texts, some hundreds of the kind that will be encoded. With them the range of
            every map's inputs is fixed to what these texts give, which is a little faster, and
            loses values beyond that range; without them each token has its own range. They need a
            ``MoESentenceTransformer``; those of too many tokens are cut, and their number is said.
        domain: of the texts, as ``MoESentenceTransformer.encode`` takes it.

    Returns:
        A new model of the same class, which cannot be trained; the input is not changed.
        Saving, loading, ``encode`` and all kinds of routing work as before.

    Raises:
        TypeError: for a model that is no mixture, and for ``texts`` that are no texts.
        ValueError: for another method, a model that is quantised already or has PEFT adapters or
            LoRA experts (see :func:`moe_fast.merge_lora`), and for ``texts`` with a bare encoder.
    """
    if method == "float8":
        raise ValueError(
            "method must be 'int8'; got 'float8': no CPU multiplies 8-bit floating numbers, so "
            "that each would be widened before its product, which is slower than bfloat16 and less "
            "exact than int8."
        )
    check_choice("method", method, METHODS)
    source = loaded(model_or_path)
    mixture = mixture_of(source)
    check_full(mixture, "quantised")
    _check_texts(texts, domain, source)
    quantized = _quantized(mixture, {"method": method, "activations": "dynamic"})
    result = source.around(quantized).eval()
    if texts is not None:
        _calibrate(result, quantized, list(texts), domain)
    return result


def _check_texts(texts: Any, domain: Any, source: Given) -> None:
    if texts is None:
        if domain is not None:
            raise ValueError(f"domain must be None without texts; got {domain!r}.")
        return
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a sequence of texts (str).")
    if len(texts) == 0:
        raise ValueError("texts must hold at least one text; got none.")
    if not hasattr(source.pipeline, "encode"):
        raise ValueError(
            "texts must be None unless the model is a MoESentenceTransformer, which can encode "
            "them; got texts."
        )


def _quantized(mixture: MoEPreTrainedModel, quantization: dict[str, str]) -> MoEPreTrainedModel:
    """A copy of the mixture with int8 layers; the weights that they replace are not copied."""
    shared = {id(p): p for p in mixture.encoder_layers.parameters() if p.dim() > 1}
    new = copy.deepcopy(mixture, dict(shared))
    for parameter in new.parameters():
        if id(parameter) not in shared:
            parameter.data = parameter.data.float()
    quantize_layers(new.encoder_layers, quantization)
    for name, parameter in list(new.encoder_layers.named_parameters()):
        if id(parameter) in shared:  # a matrix that is no linear map, such as the router's
            owner, _, leaf = name.rpartition(".")
            copied = torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            setattr(new.encoder_layers.get_submodule(owner), leaf, copied)
    new.config.quantization = quantization
    new.config.dtype = torch.float32
    if can_fuse(new.config):
        new.config.fused_output = True
    new.name_or_path = ""
    return freeze(new)


def can_fuse(config: Any) -> bool:
    """Whether a mixture's experts can be one op with the norm behind them."""
    plain = config.target == "mlp" and config.expert_form == "full" and not config.shared_bias
    return plain and type(config).architecture.not_fused is None


def _calibrate(pipeline: Any, encoder: MoEPreTrainedModel, texts: list[str], domain: Any) -> None:
    """Fix the range of every matrix's inputs to what it is for these texts."""
    matrices = {n: m for n, m in encoder.named_modules() if isinstance(m, Int8Matrix)}
    options: dict[str, Any] = {"show_progress_bar": False}
    if domain is not None:
        options["domain"] = domain
    if hasattr(pipeline, "truncate"):  # ours: it says how many texts it cuts
        options["truncate"] = True
    for matrix in matrices.values():
        matrix.seen = (0.0, 0.0)
    try:
        pipeline.encode(texts, **options)
        for matrix in matrices.values():
            ends = torch.tensor(matrix.seen, dtype=torch.float32, device=matrix.scale.device)
            matrix.register_buffer("input_range", ends)
    finally:
        for matrix in matrices.values():
            matrix.seen = None
    encoder.config.quantization = {**encoder.config.quantization, "activations": "static"}
