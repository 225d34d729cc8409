"""The JSON files of a model folder, read so that a damaged one is named."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any


def read_modules(modules: Path) -> list[tuple[str, str]]:
    """The modules of a ``modules.json``: each one's folder, inside the model's, and its kind.

    Raises:
        ValueError: unless the file lists modules, at least one, each a path and a type.
    """
    content = read_json(modules)
    fits = isinstance(content, list) and all(
        isinstance(module, dict)
        and isinstance(module.get("path"), str)
        and isinstance(module.get("type"), str)
        for module in content
    )
    if not fits or not content:
        raise ValueError(
            f"{modules} is damaged: it must list modules, at least one, each a path and a type."
        )
    for module in content:
        path = PurePath(module["path"])
        if path.is_absolute() or ".." in path.parts or "\\" in module["path"]:
            raise ValueError(
                f"{modules}: a module's path must lie inside the model's folder; got "
                f"{module['path']!r}."
            )
    return [(module["path"], module["type"].rpartition(".")[2]) for module in content]


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: naming the file, for anything else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is damaged: it must hold a JSON object; got a {type(content).__name__}."
        )
    return content


def read_json(file: Path) -> Any:
    """What a JSON file holds; a ``ValueError`` that names the file where it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, huge int
        raise ValueError(f"{file} is damaged or half-written; it is not JSON: {error}.") from None
