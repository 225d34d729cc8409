"""Loading a bare encoder and its tokenizer, with errors that name the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.strict import check_filled_once, check_loading_info


def load_encoder(path: str, head: str = "") -> Any:
    """The encoder in a folder or under a hub id, dense or mixture, bare or with a head.

    Args:
        path: the folder or hub id.
        head: one of :data:`moe_fast.architectures.HEADS`; empty: the encoder alone.

    Raises:
        ValueError: for a damaged file in a local folder, which the message names, and for weights
            that the checkpoint lacks, such as those of the head, or gives twice.
        OSError: as transformers, for what is not there.
    """
    check_checkpoint(path)
    with naming(path):
        # Code that lies beside a model is never run: whoever wants that loads the model themselves.
        model, info = getattr(transformers, f"AutoModel{head}").from_pretrained(
            path, output_loading_info=True, trust_remote_code=False
        )
        check_loading_info(info, model, path, may_be_new=False)
        check_filled_once(model, Path(path) if os.path.isdir(path) else None)
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
    """The tokenizer in the same folder or under the same hub id; ``None`` where there is none.

    One that needs code from there counts as none: the code is never run.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return None
