"""Parameters that several commands share, and the forms their values come in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of a model, or its id on the Hugging Face hub; a folder wins."
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder to write; it appears once everything is in it."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an output that exists; without, that is an error and it stays."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model computes, as PyTorch names it: cpu, cuda, cuda:1 ...; by default the "
        "first GPU where there is one, else the CPU."
    ),
]
Truncate = Annotated[
    bool,
    typer.Option(
        "--truncate/--no-truncate",
        help="Cut texts of more tokens than the model takes (max_seq_length), and say how many; "
        "with --no-truncate such a text is an error.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Texts per forward pass; more need more memory.")
]
TextColumn = Annotated[
    list[str],
    typer.Option(help="Column of the text; give it several times to join columns by a space."),
]
TEXT = ["text"]
Domain = Annotated[
    str | None, typer.Option(help="Domain of all texts, one of the model's by name.")
]
DomainColumn = Annotated[
    str | None, typer.Option(help="Column of the file that holds each text's domain by name.")
]
MOST_THREADS = 4 * (os.cpu_count() or 1)
"""Beyond it threads only wait for each other, and far beyond it the process dies."""


def file_and_domain(
    source: str, domain: str | None, domain_column: str | None
) -> tuple[Path, str | None, str | None]:
    """The file of ``FILE`` or ``DOMAIN=FILE``, and where the domains of its texts come from.

    Args:
        source: as given.
        domain, domain_column: what --domain and --domain-column say of files that name no domain.

    Returns:
        (path, domain of all texts, column of the domains); of the last two one at most.

    Raises:
        typer.BadParameter: a file without a domain, and both flags.
    """
    from moe_fast.data.sources import split_domain

    own, path = split_domain(source)
    if own is not None:
        return Path(path), own, None
    if domain is not None and domain_column is not None:
        raise typer.BadParameter(
            f"give --domain or --domain-column, not both; got {domain} and {domain_column}"
        )
    return Path(path), domain, domain_column


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
    """The character of ``--delimiter``: itself, or a tab for ``tab`` and a backslash with t.

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
