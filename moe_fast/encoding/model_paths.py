"""Finds out what kind of model is at a path (a folder or hub id), without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from moe_fast.architectures import ARCHITECTURES
from moe_fast.compat import file_of
from moe_fast.encoding.adapters import adapter_folder, base_of
from moe_fast.models.json_files import read_modules, read_object

_SEPARATORS = ("/", ".", "~")


def check_model_path(path: str) -> None:
    """Raise unless `path` is a folder or could be the id of a model on the hub."""
    if path and Path(path).is_dir():
        return
    is_id = path.count("/") <= 1 and not path.startswith(_SEPARATORS) and not path.endswith("/")
    if not path or Path(path).exists() or not is_id:
        raise FileNotFoundError(f"model {path!r}: there is no such folder")
    if not model_file(path, "config.json") and not model_file(path, "modules.json"):
        raise FileNotFoundError(
            f"model {path!r}: there is no such folder, and no such model on the Hugging Face hub "
            "(or the hub cannot be reached)"
        )


def has_modules(path: str) -> bool:
    """Whether the model at `path` is a SentenceTransformer, not a bare encoder."""
    return model_file(path, "modules.json") is not None


def is_mixture(path: str) -> bool:
    """Whether the model at `path` is one of moe_fast's, by its configuration alone."""
    kind = _encoder_config(path).get("model_type")
    return kind in [a.model_type for a in ARCHITECTURES]  # a list: `kind` may be unhashable


def refuse_nomic(path: str) -> None:
    """Raise for a mixture in nomic's format, which transformers would read as a dense model."""
    config = _encoder_config(path)
    if config.get("model_type") == "nomic_bert" and config.get("num_experts"):
        raise ValueError(
            f"model {path!r} is a mixture in the format of nomic-embed-text-v2-moe: read its "
            "folder with moe_fast.import_nomic, and save that."
        )


def _encoder_config(path: str) -> dict[str, Any]:
    modules = model_file(path, "modules.json")
    first = read_modules(modules)[0][0] if modules else ""
    config = model_file(path, f"{first}/config.json" if first else "config.json")
    return {} if config is None else read_object(config)


def model_fingerprint(path: str) -> str:
    """A fingerprint of the model, which changes with its weights and settings.

    For a folder it is the SHA-256 of the names and contents of its files, without hidden files and
    model cards; for a hub id, the commit in the cache. An adapter's base is included.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = model_file(path, "config.json") or model_file(path, "modules.json")
        return config.parent.name if config else path  # .../snapshots/COMMIT/config.json
    digest = hashlib.sha256()
    if (adapter := adapter_folder(path)) is not None:
        digest.update(model_fingerprint(base_of(path, adapter)).encode())
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not hidden and file.suffix != ".md":
            digest.update(f"{relative.as_posix()}\n{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_file(path: str, name: str) -> Path | None:
    """A file of the model, in its folder or in the hub's cache (downloaded if missing)."""
    if Path(path).is_dir():
        file = Path(path, name)
        return file if file.is_file() else None
    try:
        found = file_of(path, name)
    except OSError:
        return None
    return Path(found) if found else None
