"""Defines the parameters that several commands share, and parses their values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def option(panel: str, text: str, *flags: str, **settings: Any) -> Any:
    """Make an option with a help text, which is shown in a panel of the help."""
    return typer.Option(*flags, help=text, rich_help_panel=panel, **settings)


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
        "--overwrite",
        help="Replace an existing output. Without this flag an existing output is an error, and it "
        "is kept.",
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
    str | None,
    typer.Option(
        help="Name of the domain of all texts, one that the model knows; 'auto': the one that its "
        "domain predictor finds for each text."
    ),
]
DomainColumn = Annotated[
    str | None, typer.Option(help="Column of the file that has the name of each text's domain.")
]
MOST_THREADS = 4 * (os.cpu_count() or 1)
"""More threads only wait for each other, and with far more the process is killed."""


def file_and_domain(
    source: str, domain: str | None, domain_column: str | None
) -> tuple[Path, str | None, str | None]:
    """Split ``FILE`` or ``DOMAIN=FILE``, and decide where the domains of its texts come from.

    Args:
        source: the value that the user gave.
        domain, domain_column: values of ``--domain`` and ``--domain-column``, which are used for
            ``FILE`` and ignored for ``DOMAIN=FILE``.

    Returns:
        (path, domain of all texts, column of the domains). At most one of the last two is not
        None.

    Raises:
        typer.BadParameter: both flags are given for a ``FILE``.
        ValueError: nothing stands before or after the "=".
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
    typer.Option(
        help="Names of the file's columns, if they differ from ours: a=question,b=answer,"
        "domain=source."
    ),
]
TextColumns = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of the file's columns, if they differ from ours: text=body,id=key,"
        "domain=source."
    ),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        help="Character between the cells of CSV files, or 'tab'; by default it is found from the "
        "header."
    ),
]
SkipInvalid = Annotated[
    bool,
    typer.Option(
        "--skip-invalid", help="Skip rows that cannot be read, and say how many and which."
    ),
]


def column_names(values: Sequence[str] | None) -> dict[str, str]:
    """Parse ``--columns a=question,b=answer`` to {our name: the file's name}.

    Raises:
        typer.BadParameter: a value has not the form OURS=ITS, or one of our names is given twice.
    """
    return named_paths(split_commas(values), "--columns", "OURS=ITS")


def delimiter_for(path: str, delimiter: str | None) -> str | None:
    r"""Return the character of ``--delimiter`` for a CSV file, None for any other file.

    ``tab`` and ``\t`` mean a tab.

    Raises:
        typer.BadParameter: the delimiter is not a single character, or cannot separate cells.
    """
    from moe_fast.data.file_formats import CSV_FORMATS

    if delimiter in ("tab", "\\t"):
        delimiter = "\t"
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        raise typer.BadParameter(f"--delimiter must be one character or 'tab'; got {delimiter!r}")
    return delimiter if path.lower().removesuffix(".gz").endswith(CSV_FORMATS) else None


def check_delimiter(delimiter: str | None, sources: Iterable[str]) -> None:
    """Raise ValueError if ``--delimiter`` is given and no source is a CSV file."""
    if delimiter is not None and not any(delimiter_for(source, delimiter) for source in sources):
        raise ValueError(f"--delimiter {delimiter!r}: there is no CSV file among the data")


def text_reading(
    columns: Sequence[str] | None,
    text_column: Sequence[str],
    domain_column: str | None,
    skip_invalid: bool,
) -> dict[str, Any]:
    """Convert these flags to arguments of :func:`moe_fast.inference.embed_file`.

    Raises:
        typer.BadParameter: ``--columns`` has an unknown name, or two flags give the same column.
    """
    names = column_names(columns)
    if unknown := sorted(names.keys() - {"text", "id", "domain"}):
        raise typer.BadParameter(
            f"--columns: of texts there are text, id and domain; got {', '.join(unknown)}"
        )
    for name, given in (("text", list(text_column) != TEXT), ("domain", domain_column)):
        if given and name in names:
            raise typer.BadParameter(
                f"give --{name}-column or --columns {name}={names[name]}, not both"
            )
    return {
        "columns": (names["text"],) if "text" in names else tuple(text_column),
        "id_column": names.get("id"),
        "domain_column": domain_column or names.get("domain"),
        "skip_invalid": skip_invalid,
    }


def file_and_reading(
    source: str, domain: str | None, reading: dict[str, Any], delimiter: str | None
) -> tuple[Path, str | None, dict[str, Any]]:
    """Split ``FILE`` or ``DOMAIN=FILE``, and return how the file is read.

    Args:
        source, domain: see `file_and_domain`.
        reading: the result of `text_reading`, which is for all files.
        delimiter: the value of ``--delimiter``.

    Returns:
        (path, domain of all texts, `reading` with the domain column and delimiter of this file).
    """
    path, domain, column = file_and_domain(source, domain, reading["domain_column"])
    own = {"domain_column": column, "delimiter": delimiter_for(str(path), delimiter)}
    return path, domain, reading | own


def split_commas(values: Sequence[str] | None) -> list[str]:
    """Split the values of ``--names a,b --names c`` to the list a, b, c."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def numbers(values: Sequence[str] | None, flag: str, allowed: str = "whole numbers") -> list[int]:
    """Parse the whole numbers in ``--flag 64,32``.

    Raises:
        typer.BadParameter: a value is no whole number; the error has `allowed`.
    """
    parts = split_commas(values)
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{flag} must be {allowed}; got {', '.join(parts)}")
    return [int(part) for part in parts]


def named_paths(values: Sequence[str], flag: str, form: str = "NAME=PATH") -> dict[str, str]:
    """Parse ``law=folder medicine=other`` to {"law": "folder", "medicine": "other"}.

    Raises:
        typer.BadParameter: a value has not the form NAME=PATH, or a name is given twice.
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
