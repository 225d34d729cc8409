"""Loading a bare encoder and its tokenizer, with errors that name the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from transformers import AutoModel

from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.strict import check_loading_info


def load_encoder(path: str) -> Any:
    """The bare encoder in a folder or under a hub id, dense or mixture.

    Raises:
        ValueError: for a damaged file in a local folder, which the message names, and for weights
            that the checkpoint lacks.
        OSError: as transformers, for what is not there.
    """
    check_checkpoint(path)
    with naming(path):
        # Code that lies beside a model is never run: whoever wants that loads the model themselves.
        model, info = AutoModel.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False
        )
        check_loading_info(info, model, path)
    return model


@contextlib.contextmanager
def naming(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Have the errors of the libraries that read a model say which model it is.

    Raises:
        ValueError: for any other error than a missing file, library or memory, unless its message
            names the model already.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        message, name = str(error), str(path)
        if name in message and isinstance(error, (ValueError, TypeError, OSError)):
            raise
        kind = "" if isinstance(error, (ValueError, TypeError, OSError)) else type(error).__name__
        what = ": ".join(part for part in (kind, message) if part)
        raise ValueError(f"model {name!r} cannot be loaded: {what}") from error


def tokenizer_beside(path: str) -> Any:
    """The tokenizer in the same folder or under the same hub id; ``None`` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None
