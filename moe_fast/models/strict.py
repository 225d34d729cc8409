"""No weight is made up: what a checkpoint lacks is an error, and what nobody reads is named.

transformers fills what it does not find with random numbers and goes on with a warning, which a
program or a busy reader overlooks. Here it is an error, for dense models as for mixtures.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_fast import compat
from moe_fast.architectures import encoder_prefix
from moe_fast.models.checkpoint_files import shortened, stored_weights

logger = logging.getLogger(__name__)

# Some models are saved without a pooler, and none of ours uses one unasked.
_MAY_BE_MISSING = ("pooler.",)
# Buffers that older releases of transformers saved.
_CONSTANTS = ("position_ids", "token_type_ids", "inv_freq")
# Parameters of norms, as they were called before.
_RENAMED = {"gamma": "weight", "beta": "bias"}


def check_loading_info(
    info: Mapping[str, Any],
    model: Any,
    path: str | os.PathLike[str],
    *,
    may_be_new: bool = True,
) -> None:
    """Raise for weights that a checkpoint lacks; warn of those that the encoder has no place for.

    Heads that the model does not have, such as ``cls.predictions`` of an encoder, are nobody's
    concern. One that it has may be missing as a whole: a warning says that it is new.

    Args:
        info: what transformers' ``from_pretrained(..., output_loading_info=True)`` reports.
        model: the model that was loaded.
        path: where from, for the messages.
        may_be_new: whether the head may be missing.

    Raises:
        ValueError: naming the weights that are missing, or have other shapes than the model's.
    """
    unexpected = _encoders_own(info["unexpected_keys"], model)
    missing, new_head = _missing(set(info["missing_keys"]), model)
    kind = type(model).__name__
    if missing:
        hint = f" It has instead: {shortened(unexpected, 3)}." if unexpected else ""
        raise ValueError(f"{path} lacks weights of {kind}: {shortened(missing)}.{hint}")
    if info["mismatched_keys"]:
        names = sorted(str(key) for key in info["mismatched_keys"])
        raise ValueError(f"{path} has weights of other shapes than {kind}: {shortened(names)}.")
    if new_head and not may_be_new:
        raise ValueError(
            f"{path} has no head of {kind}, whose weights would be random. Convert the encoder "
            "alone (head=None), or train the head first."
        )
    if new_head:
        logger.warning("%s has no head of %s: the head is new, and must be trained.", path, kind)
    if unexpected:
        logger.warning(
            "%s has weights that %s has no place for, and which are not used: %s.",
            path,
            kind,
            shortened(unexpected),
        )


def check_filled_once(model: Any, folder: Path | None) -> None:
    """Raise for a weight that a checkpoint gives twice: which of the two counts would be chance.

    Args:
        model: a transformers model that was loaded.
        folder: of its files; ``None``, or not there: they are in the hub's cache, and only tied
            weights are looked at.

    Raises:
        ValueError: for a weight that stands in the files with and without the encoder's prefix, or
            by its name and by that of old checkpoints (``LayerNorm.gamma``), and for two different
            weights in the place of one that the model ties.
    """
    kind, own = type(model).__name__, model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    stored = stored_weights(folder).keys() if folder is not None else set()
    twice = [
        f"{name} as {other}"
        for name in sorted(stored)
        for other in (prefix + name, _today(name))
        if other != name and other in stored and not {name, other} <= own
    ]
    if twice:
        raise ValueError(f"{folder} has weights of {kind} twice: {shortened(twice, 3)}.")
    for target, source in compat.tied_weights(model).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            raise ValueError(
                f"{folder or model.name_or_path} has two different weights, {target} and {source}, "
                f"where {kind} ties them to one. Set tie_word_embeddings to false in its "
                "configuration to keep both, or store one of them."
            )


def _today(name: str) -> str:
    """The name of a weight that transformers reads from one of an old checkpoint."""
    for old, new in _RENAMED.items():
        if name.endswith(f"LayerNorm.{old}"):
            return name.removesuffix(old) + new
    return name


def check_encoder_weights(encoder: Any, path: str, subfolder: str = "") -> None:
    """:func:`check_loading_info` of a model that somebody else has loaded.

    Where the names in its files are exactly the model's there is nothing to find out; else
    transformers is asked to match them once more, without reading a weight where accelerate is
    installed.

    Args:
        encoder: a transformers model, without adapters.
        path: the folder or hub id it was loaded from.
        subfolder: where in it.

    Raises:
        ValueError: as :func:`check_loading_info` and :func:`check_filled_once`.
    """
    if stored_weights(Path(path, subfolder)).keys() == encoder.state_dict().keys():
        return
    try:
        import accelerate  # noqa: F401  transformers needs it to load to a device

        options: dict[str, Any] = {"device_map": "meta"}
    except ImportError:
        options = {}
    _, info = type(encoder).from_pretrained(
        path,
        config=copy.deepcopy(encoder.config),
        subfolder=subfolder,
        output_loading_info=True,
        **options,
    )
    check_loading_info(info, encoder, path)
    folder = Path(path, subfolder)
    check_filled_once(encoder, folder if folder.is_dir() else None)


def _missing(names: set[str], model: Any) -> tuple[list[str], bool]:
    """Those of the missing weights that are an error, and whether the model's head is new."""
    prefix = encoder_prefix(model)
    if not prefix:
        return sorted(n for n in names if not n.startswith(_MAY_BE_MISSING)), False
    # Tied to the embeddings, a decoder's weights are the encoder's.
    shared = {id(parameter) for parameter in model.base_model.parameters()}
    head = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(prefix) and id(parameter) not in shared
    }
    if not head or not head <= names:
        return sorted(names), False
    poolers = tuple(prefix + part for part in _MAY_BE_MISSING)
    return sorted(n for n in names - head if not n.startswith(poolers)), True


def _encoders_own(names: Iterable[str], model: Any) -> list[str]:
    """Those of some unknown names that begin as the model's own do."""
    both = (*model.state_dict(), *model.base_model.state_dict())
    own = {name.partition(".")[0] for name in both}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return sorted(
        name
        for name in names
        if name.removeprefix(prefix).partition(".")[0] in own
        and name.rpartition(".")[2] not in _CONSTANTS
    )
