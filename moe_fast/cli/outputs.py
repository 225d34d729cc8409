"""Checks the outputs of a command: their formats, and that no input is overwritten."""

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
    "papers": {"output": (".jsonl", ".jsonl.gz", ".parquet")},
    "bench": {"output": (".json",)},
}
_FILES = (  # suffixes of files, which the name of a folder must not have
    *(".json", ".jsonl", ".csv", ".tsv", ".txt", ".yaml", ".yml", ".md", ".parquet", ".npy"),
    *(".trec", ".gz", ".zip", ".tar", ".tgz", ".safetensors", ".bin", ".pt", ".faiss", *PICTURES),
)


def check_names(command: str, settings: Mapping[str, Any]) -> None:
    """Check the names of a command's outputs before it does anything.

    Raises:
        typer.BadParameter: the suffix of a name is not that of a format which the command writes.
    """
    formats = _FORMATS.get(command, {"output": _FOLDER})
    if settings.get("engine") == "ray":
        formats = {"output": _FOLDER}
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
    """Write JSON, compressed if the name ends in ``.gz``; the file is complete or not written."""
    from moe_fast.data.write import open_text
    from moe_fast.files import atomic_write

    with atomic_write(path) as temporary, open_text(temporary) as file:
        json.dump(content, file, indent=2)


def check_inputs_survive(settings: Mapping[str, Any]) -> None:
    """Raise an error, before a command runs, if ``--overwrite`` would remove an input.

    An output folder may replace an input folder, such as a model its fine-tuned version.

    Raises:
        ValueError: an output is a file that the command reads.
        ValueError: an output is a folder that contains an input or the working folder.
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
    """Yield the existing paths in a parameter's value: PATH, NAME=PATH, or a list of them."""
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(entry, (str, Path)) and str(entry):
            found = [Path(part) for part in (str(entry), str(entry).partition("=")[2]) if part]
            yield from (path for path in found if path.exists())
