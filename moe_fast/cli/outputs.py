"""``--overwrite`` replaces a result, never what the command reads or stands in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_OUTPUTS = ("output", "json_output", "save_index")


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


def one_at_a_time(function: Callable[..., None]) -> Callable[..., None]:
    """Have a command's function hold its ``output``: a second run on it is refused meanwhile."""

    @functools.wraps(function)
    def held(*, output: Path, overwrite: bool, **values: Any) -> None:
        from moe_fast.files import check_output, exclusive

        check_output(output, overwrite)
        with exclusive(output):
            function(output=output, overwrite=overwrite, **values)

    return held
