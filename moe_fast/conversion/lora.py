"""LoRA experts and what they are exchanged with: PEFT's adapters, and experts of full weights.

An adapter of a dense model that changes its MLPs alone is an expert: :func:`from_adapters` joins
several of one base to a mixture, :func:`write_adapter` writes one expert back.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moe_fast.architectures import Architecture, encoder_prefix
from moe_fast.conversion.extract import (
    dense_state,
    expert_index,
    merged,
    without_domain_tokens,
)
from moe_fast.conversion.input_model import given, loaded, mixture_of
from moe_fast.conversion.upcycle import upcycle
from moe_fast.conversion.weights import load_exactly
from moe_fast.encoding.adapters import WEIGHTS, adapter_folder, base_of, check_complete
from moe_fast.extras import require
from moe_fast.files import atomic_folder
from moe_fast.models.lora import has_lora
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import architecture_of, build_moe

_NAME = "default"  # PEFT's name of a model's only adapter
_PREFIX = "base_model.model."  # before the names in an adapter's file


class _Pair(NamedTuple):
    """The pair of one dense map: a [R, I], b [O, R], and what their product is multiplied by."""

    a: Tensor
    b: Tensor
    scale: float


def from_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    *,
    base: Any = None,
    domains: Sequence[str] | None = None,
    routing: str = "enforced",
    **upcycle_kwargs: Any,
) -> Any:
    """Join N adapters of one dense model into a mixture whose LoRA expert e is adapter e.

    The rank of the mixture is the largest of the adapters', counted per projection (of a gated MLP
    with two maps before the activation, their ranks add up); smaller pairs are filled with zeros.
    ``rsLoRA``, ``rank_pattern`` and ``alpha_pattern`` are taken into account.

    Args:
        adapters: N folders that PEFT's ``save_pretrained`` wrote, of LoRA on the maps of MLPs.
        base: the dense model, as :func:`moe_fast.upcycle` takes it; ``None``: the one that the
            adapters name.
        domains, routing: as in :func:`moe_fast.from_experts`.
        **upcycle_kwargs: any other argument of :func:`moe_fast.upcycle`, except those that the
            adapters determine: the number and form of the experts, layers and target.

    Returns:
        A new mixture; expert e computes what the base with adapter e does.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: for a folder without an adapter, adapters of several bases, and one that changes
            more than MLPs, or in another way than LoRA; the message names what.
    """
    require("peft", "peft", "from_adapters")
    folders = _adapter_folders(adapters)
    fixed = {"num_experts", "expert_form", "lora_rank", "lora_alpha", "layers", "target"}
    if taken := sorted(fixed & upcycle_kwargs.keys()):
        raise TypeError(f"from_adapters takes {', '.join(taken)} from the adapters; got a value.")
    source = loaded(
        _common_base(adapters, folders) if base is None else base,
        "base",
        head=upcycle_kwargs.pop("head", None),
    )
    source.check_domains(routing, domains)
    if upcycle_kwargs.get("cls_token_id") is None:
        upcycle_kwargs["cls_token_id"] = getattr(source.tokenizer, "cls_token_id", None)
    architecture = architecture_of(source.encoder)
    if isinstance(source.encoder, MoEPreTrainedModel):
        raise TypeError(f"base must be dense; got {type(source.encoder).__name__}, a mixture.")
    experts = _read(source.encoder, architecture, folders)
    stacks = _stacked(source.encoder, architecture, experts)
    rank, scale = _rank_and_scale(stacks)
    mixture = upcycle(
        source.encoder,
        num_experts=len(folders),
        expert_form="lora",
        lora_rank=rank,
        lora_alpha=scale * rank,
        layers=sorted({layer for pairs in stacks for layer, _ in pairs}),
        target=_target({name for pairs in stacks for _, name in pairs}),
        domains=domains,
        routing=routing,
        **upcycle_kwargs,
    )
    _fill(mixture, stacks)
    return source.around(mixture)


def write_adapter(
    model: Any, expert: int | str, folder: str | os.PathLike[str], *, base: str | None = None
) -> None:
    """Write a LoRA expert as an adapter that PEFT loads onto the dense model ``base``.

    Args:
        model: a mixture with LoRA experts, or a ``MoESentenceTransformer`` on one.
        expert: its index, or (enforced routing) its domain's name.
        folder: where to write; an adapter that is there is replaced.
        base: folder or hub id of the dense model that the mixture was made of, which is loaded to
            compare; ``None``: ``config.upcycled_from``.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: for a model that is no mixture.
        ValueError: the experts are not LoRA's, the expert is unknown, or the mixture differs from
            ``base`` in more than its experts: then :func:`moe_fast.extract_expert` keeps all.
    """
    peft = require("peft", "peft", "write_adapter")
    mixture = mixture_of(given(model))
    index = expert_index(mixture.config, expert)
    _check_lora(mixture)
    name = base or mixture.config.upcycled_from
    if not name:
        raise ValueError("base must name the dense model that the mixture was made of; got None.")
    dense = loaded(name, "base", head=mixture.moe_head or None).encoder
    _check_base(mixture, dense.to(mixture.dtype), index, name)
    pairs = _pairs_of(mixture, index)
    settings = peft.LoraConfig(
        r=mixture.config.lora_rank,
        lora_alpha=mixture.config.lora_alpha,
        target_modules=sorted(pairs),
        base_model_name_or_path=str(name),
    )
    wrapped = peft.get_peft_model(dense, settings)
    modules = dict(wrapped.base_model.model.named_modules())
    with torch.no_grad():
        for path, pair in pairs.items():
            modules[path].lora_A[_NAME].weight.copy_(pair.a)
            modules[path].lora_B[_NAME].weight.copy_(pair.b)
    wrapped.peft_config[_NAME].base_model_name_or_path = str(name)
    with atomic_folder(folder, replaces=("adapter_*",)) as temporary:
        wrapped.save_pretrained(str(temporary))


def merge_lora(model: Any) -> Any:
    """Make a mixture whose experts have weights of their own from one with LoRA experts.

    Args:
        model: a mixture with LoRA experts, or a model of sentence-transformers on one.

    Returns:
        A new model with the same output; ``model`` is not changed.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: the experts are not LoRA's.
    """
    source = given(model)
    mixture = mixture_of(source)
    _check_lora(mixture)
    config = copy.deepcopy(mixture.config)
    config.expert_form, config.lora_rank, config.lora_alpha = "full", None, None
    with torch.device("meta"):
        new = build_moe(config, mixture)
    weights = {name: value.clone() for name, value in mixture.state_dict().items()}
    prefix, join = encoder_prefix(mixture), mixture.architecture.join
    for layer, mlp in mixture.moe_mlps().items():
        for name in (mlp.up_name, "down_proj"):
            if not mlp.has_pair(name):
                continue
            place = prefix + join(layer, f"mlp.{name}")
            everyone = range(mlp.num_experts)
            pair = mlp.pair(name)
            weights[place] = torch.stack([merged(weights[place], pair, e) for e in everyone])
            for end in ("_A", "_B"):
                del weights[place + end]
            if (bias := weights.get(f"{place}_bias")) is not None:
                weights[f"{place}_bias"] = bias.repeat(mlp.num_experts, 1)
    load_exactly(new, weights, buffers_of=mixture)
    return source.around(new.train(mixture.training))


def _check_lora(mixture: MoEPreTrainedModel) -> None:
    if not has_lora(mixture):
        raise ValueError(
            "model must have LoRA experts (expert_form='lora'); its experts have weights of their "
            "own."
        )


def _adapter_folders(adapters: Any) -> list[Path]:
    if isinstance(adapters, (str, os.PathLike)) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters must be a sequence of folders; got {adapters!r}.")
    if not adapters:
        raise ValueError("adapters must hold at least one folder; got none.")
    folders = []
    for path in adapters:
        folder = adapter_folder(os.fspath(path))
        if folder is None:
            raise ValueError(f"adapters must be folders that PEFT wrote; {path} is none.")
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} has no {WEIGHTS}: save the adapter as safetensors.")
        folders.append(folder)
    return folders


def _common_base(paths: Sequence[Any], folders: Sequence[Path]) -> str:
    bases = [base_of(os.fspath(path), f) for path, f in zip(paths, folders, strict=True)]
    if len(set(bases)) > 1:
        raise ValueError(
            f"adapters must have one base; they name {', '.join(sorted(set(bases)))}. Give base=..."
        )
    return bases[0]


def _read(
    encoder: PreTrainedModel, architecture: Architecture, folders: Sequence[Path]
) -> list[dict[str, _Pair]]:
    """The pairs of each adapter by the name of the dense map that they change; PEFT reads them."""
    from peft import PeftModel

    maps = _maps(encoder, architecture)
    dense: Any = copy.deepcopy(encoder)
    experts = []
    for folder in folders:
        _check_changes_mlps(folder, maps)
        try:
            wrapped: Any = PeftModel.from_pretrained(dense, str(folder))
            check_complete(wrapped, folder)
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"the adapter in {folder} does not fit its base: {error}") from error
        experts.append(
            {
                name: _Pair(
                    module.lora_A[_NAME].weight.detach().clone(),
                    module.lora_B[_NAME].weight.detach().clone(),
                    float(module.scaling[_NAME]),
                )
                for name, module in wrapped.base_model.model.named_modules()
                if name in maps and hasattr(module, "lora_A")
            }
        )
        dense = wrapped.unload()
    return experts


def _maps(encoder: PreTrainedModel, architecture: Architecture) -> dict[str, tuple[int, str, int]]:
    """The linear maps of all MLPs: {name: (layer, the mixture's name, place among its parts)}."""
    prefix, found = encoder_prefix(encoder), {}
    for layer in range(encoder.config.num_hidden_layers):
        for new, parts in architecture.mlp_names.items():
            for place, name in enumerate(parts if not new.endswith("_bias") else ()):
                path = prefix + architecture.join(layer, name.removesuffix(".weight"))
                found[path] = layer, new.removeprefix("mlp."), place
    return found


def _check_changes_mlps(folder: Path, maps: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an adapter with anything else than pairs of maps of MLPs."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = [name.removeprefix(_PREFIX) for name in file.keys()]  # noqa: SIM118
    ends = (".lora_A.weight", ".lora_B.weight")
    other = sorted(n for n in names if not (n.endswith(ends) and n[: -len(ends[0])] in maps))
    if other or not names:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        raise ValueError(
            f"the adapter in {folder} must have LoRA pairs of MLPs and nothing else, to be an "
            f"expert; got {', '.join(other[:5]) or 'none'}{more}. Join it as a dense model instead,"
            " with from_experts, which merges adapters into their base."
        )


def _stacked(
    encoder: PreTrainedModel, architecture: Architecture, experts: Sequence[dict[str, _Pair]]
) -> list[dict[tuple[int, str], _Pair]]:
    """The pairs by (layer, projection of a mixture); those of two maps become one pair."""
    maps = _maps(encoder, architecture)
    parts: dict[tuple[int, str], list[str]] = {}
    for name, (layer, projection, _) in maps.items():
        parts.setdefault((layer, projection), []).append(name)
    return [
        {
            key: _joined([pairs.get(name) for name in names], encoder, names)
            for key, names in parts.items()
            if any(name in pairs for name in names)
        }
        for pairs in experts
    ]


def _joined(pairs: Sequence[_Pair | None], encoder: PreTrainedModel, names: Sequence[str]) -> _Pair:
    """One pair of maps that stand above each other: their A above each other, B on a diagonal."""
    if len(pairs) == 1 and pairs[0] is not None:
        return pairs[0]
    scale = next(pair.scale for pair in pairs if pair is not None)
    above, diagonal = [], []
    for pair, name in zip(pairs, names, strict=True):
        out, width = encoder.get_submodule(name).weight.shape
        if pair is None:
            diagonal.append(torch.zeros(out, 0))
            continue
        above.append(pair.a)
        diagonal.append(pair.b if pair.scale == scale else pair.b * (pair.scale / scale))
    return _Pair(torch.cat(above), torch.block_diag(*diagonal), scale)


def _rank_and_scale(experts: Sequence[dict[Any, _Pair]]) -> tuple[int, float]:
    """The largest rank, and the most frequent scale, whose pairs then stay as they are."""
    pairs = [pair for of_expert in experts for pair in of_expert.values()]
    scales = [pair.scale for pair in pairs]
    return max(len(pair.a) for pair in pairs), max(sorted(set(scales)), key=scales.count)


def _target(projections: set[str]) -> str:
    """What the experts of these projections differ in."""
    if len(projections) > 1:
        return "mlp"
    return "output" if "down_proj" in projections else "intermediate"


def _fill(mixture: MoEPreTrainedModel, experts: Sequence[dict[tuple[int, str], _Pair]]) -> None:
    """Copy pairs into a mixture; what an adapter leaves alone is a pair of zeros."""
    with torch.no_grad():
        for layer, mlp in mixture.moe_mlps().items():
            for name in filter(mlp.has_pair, (mlp.up_name, "down_proj")):
                a, b, scale = mlp.pair(name)
                b.zero_()
                for e, pairs in enumerate(experts):
                    if (pair := pairs.get((layer, name))) is None:
                        continue
                    rank = len(pair.a)
                    a[e, rank:] = 0
                    a[e, :rank] = pair.a
                    b[e, :, :rank] = (
                        pair.b if pair.scale == scale else pair.b * (pair.scale / scale)
                    )


def _pairs_of(mixture: MoEPreTrainedModel, expert: int) -> dict[str, _Pair]:
    """An expert's pairs by the names of the dense maps; two maps of one projection share A."""
    found, prefix = {}, encoder_prefix(mixture)
    for layer, mlp in mixture.moe_mlps().items():
        for name in filter(mlp.has_pair, (mlp.up_name, "down_proj")):
            a, b, scale = mlp.pair(name)
            parts = mixture.architecture.mlp_names[f"mlp.{name}"]
            for part, rows in zip(parts, b[expert].chunk(len(parts)), strict=True):
                path = prefix + mixture.architecture.join(layer, part.removesuffix(".weight"))
                found[path] = _Pair(a[expert], rows, scale)
    return found


def _check_base(mixture: MoEPreTrainedModel, base: PreTrainedModel, expert: int, name: str) -> None:
    """Raise ``ValueError`` unless the mixture without its pairs is the dense model ``base``."""
    shared = dense_state(mixture, expert, with_pairs=False)
    differing = []
    for key, value in base.state_dict().items():
        own = shared.get(key)
        if own is not None and own.shape[:1] > value.shape[:1]:
            own = without_domain_tokens(mixture.config, own, expert)
        if own is None or not torch.equal(own.to(value.device), value):
            differing.append(key)
    if differing:
        raise ValueError(
            f"base must be the dense model that the mixture was made of, unchanged; {name} differs "
            f"from what its experts share in {', '.join(differing[:5])}"
            f"{', ...' if len(differing) > 5 else ''}. An adapter cannot hold that: "
            "moe_fast.extract_expert makes a whole model of the expert."
        )
