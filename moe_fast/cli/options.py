"""Parameters that several commands share, and the forms their values come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that exists; otherwise it is kept.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU where there is one.")
]
Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate", help="Cut texts longer than the model takes; otherwise they are an error."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
TextColumn = Annotated[
    list[str], typer.Option(help="Column of the text; several are joined by a space.")
]
TEXT = ["text"]
Domain = Annotated[str | None, typer.Option(help="Domain of all texts.")]
DomainColumn = Annotated[str | None, typer.Option(help="Column with each text's domain.")]


Columns = Annotated[
    list[str] | None,
    typer.Option(help="Columns called otherwise: a=question,b=answer,domain=source."),
]
Delimiter = Annotated[
    str | None,
    typer.Option(help="Between the cells of CSV files, or 'tab'; by default as the header says."),
]
SkipInvalid = Annotated[
    bool,
    typer.Option(
        "--skip-invalid", help="Skip rows that cannot be read, and say how many and which."
    ),
]


def column_names(values: Sequence[str] | None) -> dict[str, str]:
    """{our name: the file's name} of ``--columns a=question,b=answer``.

    Raises:
        typer.BadParameter: for a value that is no OURS=ITS, or a name of ours given twice.
    """
    return named_paths(split_commas(values), "--columns", "OURS=ITS")


def delimiter_character(value: str | None) -> str | None:
    """The character of ``--delimiter``: itself, or a tab for ``tab`` and ``\\t``.

    Raises:
        typer.BadParameter: for anything else.
    """
    if value is None or value in ("tab", "\\t"):
        return value and "\t"
    if len(value) != 1 or value in '"\r\n\0':
        raise typer.BadParameter(f"--delimiter must be one character or 'tab'; got {value!r}")
    return value


def split_commas(values: Sequence[str] | None) -> list[str]:
    """The names in ``--names a,b --names c``: a, b, c."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def numbers(values: Sequence[str] | None, flag: str) -> list[int]:
    """The whole numbers in ``--flag 64,32``.

    Raises:
        typer.BadParameter: for anything else.
    """
    parts = split_commas(values)
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{flag} must be whole numbers; got {', '.join(parts)}")
    return [int(part) for part in parts]


def named_paths(values: Sequence[str], flag: str, form: str = "NAME=PATH") -> dict[str, str]:
    """The pairs in ``law=folder medicine=other``.

    Raises:
        typer.BadParameter: for a value that has not the form, or a name given twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{flag} must be {form}; got {value!r}")
        if name in found:
            raise typer.BadParameter(f"{flag}: the name {name!r} is there twice")
        found[name] = path
    return found
