"""Describes a run of ``embed`` by everything that its vectors depend on, to resume no other run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_fast.encoding.model_paths import model_fingerprint
from moe_fast.files import write_text
from moe_fast.inference.text_encoder import EncoderSettings
from moe_fast.version import __version__

MANIFEST = "manifest.json"
_HASHES = ("source", "model")


def describe_run(settings: EncoderSettings, **others: Any) -> dict[str, Any]:
    """Return everything that the vectors depend on, except the number of threads.

    ``truncate`` is not in it, because it does not change vectors of texts that are not too long.

    Args:
        settings: the model and how it is called.
        **others: what else the vectors depend on, by name; tuples become lists, as in JSON.
    """
    import sentence_transformers
    import transformers

    chosen = asdict(settings)
    for name in ("model", "truncate"):
        chosen.pop(name)
    return {
        **{name: list(v) if isinstance(v, tuple) else v for name, v in others.items()},
        **chosen,
        "model": model_fingerprint(settings.model),
        "versions": {
            "moe_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__,
        },
    }


def manifest_key(manifest: dict[str, Any]) -> str:
    """Return a hash of a manifest, for names of files."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: Path, kind: str, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder of unfinished work; `kind` marks it as one of ours."""
    write_text(folder / MANIFEST, json.dumps({"kind": kind, **manifest}, indent=2))


def read_manifest(folder: Path, kind: str) -> dict[str, Any] | None:
    """Read the manifest of this kind in a folder; None if there is none, or one of another kind."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.pop("kind", None) != kind:
        return None
    return None if folder.is_symlink() else manifest


def differing_names(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of the entries that differ, sorted."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def changes(before: dict[str, Any], now: dict[str, Any], names: list[str]) -> str:
    """List the settings that differ, with both values except for hashes."""
    shown = [
        name
        if name in _HASHES
        else f"{name} ({_short(before.get(name))} then, {_short(now.get(name))} now)"
        for name in names
    ]
    return ", ".join(shown)


def _short(value: Any) -> str:
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
