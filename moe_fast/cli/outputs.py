"""What a command writes: its name says its format, and it replaces nothing that is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

JSON = (".json", ".json.gz")
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
RUNS = ("", ".trec", ".run", ".txt", ".trec.gz", ".run.gz", ".txt.gz")
VECTORS = (".npy", ".parquet")
_OUTPUTS = ("output", "json_output", "save_index")
_FOLDER: tuple[str, ...] = ()
_FORMATS: dict[str, dict[str, tuple[str, ...]]] = {  # command: {parameter: its formats}
    "embed": {"output": VECTORS},
    "search": {"output": RUNS, "save_index": _FOLDER},
    "evaluate": {"json_output": JSON},
    "inspect": {"output": PICTURES, "json_output": JSON},
    "mine": {"output": (".jsonl", ".jsonl.gz", ".parquet")},
    "bench": {"output": (".json",)},
}
_FILES = (  # suffixes of files, which no folder should be called by
    *(".json", ".jsonl", ".csv", ".tsv", ".txt", ".yaml", ".yml", ".md", ".parquet", ".npy"),
    *(".trec", ".gz", ".zip", ".tar", ".tgz", ".safetensors", ".bin", ".pt", ".faiss", *PICTURES),
)


def check_names(command: str, settings: Mapping[str, Any]) -> None:
    """Look at the names of a command's outputs, before it does anything.

    Raises:
        typer.BadParameter: a name that promises a format which the command does not write there.
    """
    formats = _FORMATS.get(command, {"output": _FOLDER})
    for name, allowed in formats.items():
        if settings.get(name) is None:
            continue
        path, flag = Path(settings[name]), "--" + name.removesuffix("_output").replace("_", "-")
        suffix = path.suffix
        if allowed == _FOLDER:
            if suffix.lower() in _FILES:
                raise typer.BadParameter(f"{flag} {path} will be a folder; {suffix} is for a file")
            continue
        fits = any(path.name.lower().endswith(known) for known in allowed if known)
        if not fits and (suffix or "" not in allowed):
            listed = ", ".join(known or "no suffix" for known in allowed)
            raise typer.BadParameter(
                f"{flag} {path}: the name says the format, which can be {listed}; "
                f"got {suffix or 'a name without a suffix'}"
            )


def write_json(content: Any, path: Path) -> None:
    """Write JSON, compressed where the name ends in ``.gz``; whole or not at all."""
    from moe_fast.data.write import open_text
    from moe_fast.files import atomic_write

    with atomic_write(path) as temporary, open_text(temporary) as file:
        json.dump(content, file, indent=2)


def check_inputs_survive(settings: Mapping[str, Any]) -> None:
    """Look at a command's parameters before it runs. A model may be replaced by its successor.

    Raises:
        ValueError: an output that is a file the command reads, or a folder with an input or the
            working folder in it.
    """
    if not settings.get("overwrite"):
        return  # what exists is kept
    inputs = [path for name, v in settings.items() if name not in _OUTPUTS for path in _paths(v)]
    for name in _OUTPUTS:
        if settings.get(name) is None:
            continue
        output = Path(settings[name])
        place = output.resolve()
        if Path.cwd().is_relative_to(place):
            raise ValueError(f"--overwrite: {output} holds the working folder; it is not replaced")
        for path in inputs:
            same_file = path.resolve() == place and place.is_file()
            if same_file or place in path.resolve().parents:
                raise ValueError(f"--overwrite: replacing {output} would remove {path}, an input")


def _paths(value: Any) -> Iterator[Path]:
    """What exists on the disk of a parameter's value: PATH, NAME=PATH, or a list of them."""
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(entry, (str, Path)) and str(entry):
            found = [Path(part) for part in (str(entry), str(entry).partition("=")[2]) if part]
            yield from (path for path in found if path.exists())
