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

from moe_fast.models.checkpoint_files import shortened, stored_weights

logger = logging.getLogger(__name__)

# Some models are saved without a pooler, and none of ours uses one unasked.
_MAY_BE_MISSING = ("pooler.",)
# Buffers that older releases of transformers saved.
_CONSTANTS = ("position_ids", "token_type_ids", "inv_freq")


def check_loading_info(info: Mapping[str, Any], model: Any, path: str | os.PathLike[str]) -> None:
    """Raise for weights that a checkpoint lacks; warn of those that the encoder has no place for.

    Heads, such as ``cls.predictions``, are nobody's concern: an encoder has none.

    Args:
        info: what transformers' ``from_pretrained(..., output_loading_info=True)`` reports.
        model: the model that was loaded.
        path: where from, for the messages.

    Raises:
        ValueError: naming the weights that are missing, or have other shapes than the model's.
    """
    unexpected = _encoders_own(info["unexpected_keys"], model)
    missing = sorted(n for n in info["missing_keys"] if not n.startswith(_MAY_BE_MISSING))
    kind = type(model).__name__
    if missing:
        hint = f" It has instead: {shortened(unexpected, 3)}." if unexpected else ""
        raise ValueError(f"{path} lacks weights of {kind}: {shortened(missing)}.{hint}")
    if info["mismatched_keys"]:
        names = sorted(str(key) for key in info["mismatched_keys"])
        raise ValueError(f"{path} has weights of other shapes than {kind}: {shortened(names)}.")
    if unexpected:
        logger.warning(
            "%s has weights that %s has no place for, and which are not used: %s.",
            path,
            kind,
            shortened(unexpected),
        )


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
        ValueError: as :func:`check_loading_info`.
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


def _encoders_own(names: Iterable[str], model: Any) -> list[str]:
    """Those of some unknown names that begin as the model's own do."""
    own = {name.partition(".")[0] for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return sorted(
        name
        for name in names
        if name.removeprefix(prefix).partition(".")[0] in own
        and name.rpartition(".")[2] not in _CONSTANTS
    )
