"""import_checkpoint: reads checkpoints of other code that stores experts as lists of modules.

The name of a tensor says which layer, expert and projection it belongs to. A style is a list of
rules that read the names. The styles follow the published code of Hallee et al. (arXiv 2401.15713),
Yu (arXiv 2412.17364) and transformers.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from moe_fast.conversion.input_model import given, mixture_of
from moe_fast.conversion.weights import load_exactly
from moe_fast.models.checkpoint_files import (
    check_checkpoint,
    check_safetensors,
    shortened,
    weight_files,
)
from moe_fast.models.registry import build_moe
from moe_fast.ops.checks import check_choice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyRule:
    """How to read one kind of name in a foreign checkpoint.

    Attributes:
        pattern: a regular expression that the whole name must match. If it has a group ``expert``,
            that is the index of the expert; the tensor is its slice of the stacked parameter.
        name: the name of the mixture's parameter, with groups filled in as in ``str.format``: for
            example ``"encoder.layer.{layer}.mlp.up_proj"``. ``None``: such tensors are left out.
        half: the half of a gated ``gate_up_proj`` [2H, D] that the tensor is: 0, the activated
            one; 1, the other; ``None``, the whole.
        must_equal: with ``name=None``: a tensor with any other value is an error.
    """

    pattern: str
    name: str | None
    half: int | None = None
    must_equal: float | None = None


_PREFIX = r"(?:(?:bert|roberta|model|encoder_model|auto_model)\.)?"
_BERT_LAYER = _PREFIX + r"encoder\.layer\.(?P<layer>\d+)\."
_LAYER = _PREFIX + r"layers\.(?P<layer>\d+)\."
_EXPERT = r"experts\.(?P<expert>\d+)\."
_SAME = (
    KeyRule(_PREFIX + r"embeddings\.(?:position_ids|token_type_ids)", None),  # constants
    KeyRule(_PREFIX + r"(?P<rest>(?:embeddings|encoder|layers|final_norm|pooler)\..+)", "{rest}"),
)
_BERT_UP, _BERT_DOWN = "encoder.layer.{layer}.mlp.up_proj", "encoder.layer.{layer}.mlp.down_proj"


def _linear(pattern: str, name: str, half: int | None = None) -> tuple[KeyRule, KeyRule]:
    return (
        KeyRule(pattern + r"\.weight", name, half),
        KeyRule(pattern + r"\.bias", f"{name}_bias", half),
    )


def _gated(moe: str, gate: str, up: str, down: str) -> tuple[KeyRule, ...]:
    """Rules for three linear maps per expert and a router called gate."""
    expert = _LAYER + moe + r"\." + _EXPERT
    return (
        *_linear(expert + gate, "layers.{layer}.mlp.gate_up_proj", 0),
        *_linear(expert + up, "layers.{layer}.mlp.gate_up_proj", 1),
        *_linear(expert + down, "layers.{layer}.mlp.down_proj"),
        KeyRule(_LAYER + moe + r"\.gate\.weight", "layers.{layer}.mlp.router.weight"),
        *_SAME,
    )


IMPORT_STYLES: dict[str, tuple[KeyRule, ...]] = {
    # Hallee et al., BERT: encoder.layer.0.moe_block.experts.0.intermediate_up.weight
    "hallee_bert": (
        *_linear(_BERT_LAYER + r"moe_block\." + _EXPERT + "intermediate_up", _BERT_UP),
        *_linear(_BERT_LAYER + r"moe_block\." + _EXPERT + "intermediate_down", _BERT_DOWN),
        # Multiplies the activation; it starts as the constant 1.
        KeyRule(_BERT_LAYER + r"moe_block\..+\.new_linear\.weight", None, must_equal=0.0),
        KeyRule(_BERT_LAYER + r"moe_block\..+\.new_linear\.bias", None, must_equal=1.0),
        KeyRule(
            _BERT_LAYER + r"moe_block\.gate\.weight", "encoder.layer.{layer}.mlp.router.weight"
        ),
        KeyRule(
            _BERT_LAYER + r"LayerNorm\.(?P<leaf>weight|bias)",
            "encoder.layer.{layer}.output.LayerNorm.{leaf}",
        ),
        KeyRule(r"temp|aux_loss\..+", None),
        *_SAME,
    ),
    # Hallee et al., ModernBERT: bert.layers.0.mlp.experts.0.Wi.weight
    "hallee_modernbert": (
        *_linear(_LAYER + r"mlp\." + _EXPERT + "Wi", "layers.{layer}.mlp.gate_up_proj"),
        *_linear(_LAYER + r"mlp\." + _EXPERT + "Wo", "layers.{layer}.mlp.down_proj"),
        KeyRule(r"pooler\.(?:w1|w2|layernorm)\..+", None),  # their projection head
        *_SAME,
    ),
    # Yu, XLM-RoBERTa: encoder.layer.0.intermediate.dense.experts.0.weight
    "yu": (
        *_linear(_BERT_LAYER + r"intermediate\.dense\.experts\.(?P<expert>\d+)", _BERT_UP),
        *_linear(_BERT_LAYER + r"output\.dense\.experts\.(?P<expert>\d+)", _BERT_DOWN),
        *_linear(_BERT_LAYER + r"intermediate\.dense", _BERT_UP),
        *_linear(_BERT_LAYER + r"output\.dense", _BERT_DOWN),
        KeyRule(
            _BERT_LAYER + r"(?:intermediate|output)\.dense\.gate\.weight",
            "encoder.layer.{layer}.mlp.router.weight",
        ),
        *_SAME,
    ),
    # transformers up to 4: layers.0.block_sparse_moe.experts.0.w1.weight
    "mixtral": _gated("block_sparse_moe", "w1", "w3", "w2"),
    # transformers up to 4: layers.0.mlp.experts.0.gate_proj.weight
    "qwen_moe": _gated("mlp", "gate_proj", "up_proj", "down_proj"),
    # transformers from 5: layers.0.mlp.experts.gate_up_proj
    "transformers": (
        KeyRule(
            _LAYER + r"mlp\.experts\.(?P<leaf>(?:gate_up_proj|down_proj)(?:_bias)?)",
            "layers.{layer}.mlp.{leaf}",
        ),
        KeyRule(_LAYER + r"mlp\.gate\.weight", "layers.{layer}.mlp.router.weight"),
        *_SAME,
    ),
}


def import_checkpoint(
    checkpoint: Mapping[str, Tensor] | str | os.PathLike[str],
    like: Any,
    *,
    style: str | Sequence[KeyRule],
) -> Any:
    """Make a mixture with the weights of a checkpoint that names and splits them differently.

    The styles read these names; prefixes such as ``bert.`` or ``model.`` may precede them:

    - "hallee_bert": ``encoder.layer.0.moe_block.experts.0.intermediate_up``. Only the weights can
      be taken over, as a start for fine-tuning: that code normalises before the experts and adds
      after them, BERT the other way round, so outputs differ from those of that code (a warning
      says so). A gate (``new_linear``) that was trained is an error.
    - "hallee_modernbert": ``layers.0.mlp.experts.0.Wi``; the projection head is left out, and
      :func:`moe_fast.add_projection_head` reads it from the same checkpoint.
    - "yu": ``encoder.layer.0.intermediate.dense.experts.0`` (or ``output.dense``): targets
      "intermediate" and "output"; give ``like`` ``weight_mode="renormalize"``, as that code does.
    - "mixtral", "qwen_moe", "transformers": ``block_sparse_moe.experts.0.w1``,
      ``mlp.experts.0.gate_proj``, stacked ``mlp.experts.gate_up_proj``; gated architectures.

    Domain tokens must be the vocabulary's last rows, in the order of ``like``'s domains.

    Args:
        checkpoint: names and tensors; or a safetensors file, or a folder with one or its shards.
            Pickled files are refused.
        like: a mixture (or ``MoESentenceTransformer``) with the checkpoint's sizes and routing,
            such as :func:`moe_fast.upcycle` makes from the dense model that it started from.
        style: the name of one of these styles, or your own rules. The first rule whose pattern
            matches a name is used.

    Returns:
        A new model like ``like``, in its dtype and on its device, with all weights from the
        checkpoint.

    Raises:
        ValueError: the message lists names that no rule reads, names and experts that are missing
            or given twice, shapes that do not fit, and dtypes that ``like``'s cannot represent.
        FileNotFoundError: there is no checkpoint.
    """
    source = given(like)
    like = mixture_of(source, "like")
    if isinstance(style, str):
        check_choice("style (or a sequence of KeyRule)", style, IMPORT_STYLES)
    rules = IMPORT_STYLES[style] if isinstance(style, str) else style
    _check_rules(rules)
    state = checkpoint if isinstance(checkpoint, Mapping) else read_weights(Path(checkpoint))
    weights = _assemble(state, like.state_dict(), rules)
    if style == "hallee_bert":
        logger.warning(
            "style='hallee_bert': that code places LayerNorm before the experts, BERT after them: "
            "the weights are taken over, the outputs differ. Fine-tune before use."
        )
    config = copy.deepcopy(like.config)
    with torch.device("meta"):
        new = build_moe(config, like)
    load_exactly(new, weights, buffers_of=like)
    return source.around(new.train(like.training))


def _check_rules(rules: Sequence[KeyRule]) -> None:
    for rule in rules:
        try:
            groups = re.compile(rule.pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"style: pattern {rule.pattern!r} is no regular expression: {error}"
            ) from None
        fields = {field for _, field, _, _ in Formatter().parse(rule.name or "") if field}
        if not fields <= groups.keys() or rule.half not in (None, 0, 1):
            raise ValueError(
                f"style: name must use groups of its pattern alone, and half be None, 0 or 1; got "
                f"{rule}."
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a folder with one or its shards.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: for a damaged file, a pickle, and a tensor that two shards hold.
    """
    if path.is_file():
        check_safetensors(path)
        return load_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint must be a file or a folder; there is no {path}.")
    check_checkpoint(path)
    weights: dict[str, Tensor] = {}
    for file in weight_files(path):
        shard = load_file(file)
        if twice := sorted(shard.keys() & weights.keys()):
            raise ValueError(f"{file} gives weights a second time: {shortened(twice)}.")
        weights |= shard
    if weights:
        return weights
    if (path / WEIGHTS_NAME).exists():
        check_safetensors(path / WEIGHTS_NAME)  # says why a pickle is refused
    raise FileNotFoundError(f"{path} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}.")


def _assemble(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rules: Sequence[KeyRule]
) -> dict[str, Tensor]:
    """The weights of the mixture ``wanted``; every element must be given exactly once."""
    weights = {name: torch.empty_like(value) for name, value in wanted.items()}
    written = {
        name: torch.zeros(value.shape[:2], dtype=torch.bool) for name, value in wanted.items()
    }
    problems: dict[str, list[str]] = {}
    left_out = []
    for key, tensor in state.items():
        rule, groups = _first_match(rules, key)
        if rule is None:
            problems.setdefault("no rule reads", []).append(key)
        elif rule.name is None:
            left_out.append(key)
            if rule.must_equal is not None and not bool((tensor == rule.must_equal).all()):
                problems.setdefault("the model has no place for the trained", []).append(key)
        else:
            problem = _write(rule, groups, tensor, weights, written)
            if problem:
                problems.setdefault(problem[0], []).append(f"{key} {problem[1]}")
    missing = [_where_missing(name, mask) for name, mask in written.items() if not mask.all()]
    if missing:
        problems["the checkpoint lacks"] = missing
    if problems:
        listed = "; ".join(f"{what}: {shortened(names)}" for what, names in problems.items())
        raise ValueError(f"checkpoint does not fit the model: {listed}.")
    if left_out:
        logger.info("Left out of the checkpoint: %s.", shortened(left_out))
    return weights


def _first_match(rules: Sequence[KeyRule], key: str) -> tuple[KeyRule | None, dict[str, str]]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, key)
        if match:
            return rule, match.groupdict()
    return None, {}


def _write(
    rule: KeyRule,
    groups: dict[str, str],
    tensor: Tensor,
    weights: dict[str, Tensor],
    written: dict[str, Tensor],
) -> tuple[str, str] | None:
    """Copy one tensor to its place, or return a problem: (what is wrong, the place)."""
    assert rule.name is not None
    name = rule.name.format(**groups)
    if name not in weights:
        return "the model has no", f"-> {name}"
    place, mask, label = weights[name], written[name], name
    if "expert" in groups:
        expert = int(groups["expert"])
        label = f"{name}[{expert}]"
        if not 0 <= expert < place.shape[0]:
            return "the model has too few experts for", f"-> {label} of {place.shape[0]}"
        place, mask = place[expert], mask[expert]
    if rule.half is not None:
        dim = 0 if "expert" in groups else 1
        size = place.shape[dim] // 2
        place = place.narrow(dim, rule.half * size, size)
        mask = mask.narrow(dim, rule.half * size, size)
    if tensor.shape != place.shape:
        return "shapes differ", f"{list(tensor.shape)} -> {label} {list(place.shape)}"
    fits = torch.promote_types(tensor.dtype, place.dtype) == place.dtype
    if not fits or not tensor.is_floating_point():  # integers are quantised weights
        return "the model's dtype cannot hold", f"({tensor.dtype} -> {place.dtype})"
    if mask.any():
        return "given twice", f"-> {label}"
    place.copy_(tensor)
    mask.fill_(True)
    return None


def _where_missing(name: str, mask: Tensor) -> str:
    """The name of a parameter; if only some experts are missing, also which."""
    rows = mask if mask.dim() == 1 else mask.all(dim=1)
    if not rows.any() or ".mlp." not in name:
        return name
    return f"{name}[{', '.join(str(e) for e in (~rows).nonzero().flatten().tolist())}]"
