"""Parameters that several commands share, and the forms their values come in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def option(panel: str, text: str, *flags: str, **settings: Any) -> Any:
    """An option, by its help text, in a panel of the help."""
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
TextColumns = Annotated[
    list[str] | None,
    typer.Option(help="Columns called otherwise: text=body,id=key,domain=source."),
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


def delimiter_for(path: str, delimiter: str | None) -> str | None:
    """The character of ``--delimiter`` for a CSV file, None for any other file.

    ``tab`` and a backslash with t stand for a tab.

    Raises:
        typer.BadParameter: a delimiter that is no single character.
    """
    from moe_fast.data.file_formats import CSV_FORMATS

    if delimiter in ("tab", "\\t"):
        delimiter = "\t"
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        raise typer.BadParameter(f"--delimiter must be one character or 'tab'; got {delimiter!r}")
    return delimiter if path.lower().removesuffix(".gz").endswith(CSV_FORMATS) else None


def check_delimiter(delimiter: str | None, sources: Iterable[str]) -> None:
    """Raise ValueError where ``--delimiter`` is given and no source is a CSV file."""
    if delimiter is not None and not any(delimiter_for(source, delimiter) for source in sources):
        raise ValueError(f"--delimiter {delimiter!r}: there is no CSV file among the data")


def text_reading(
    columns: Sequence[str] | None,
    text_column: Sequence[str],
    domain_column: str | None,
    skip_invalid: bool,
) -> dict[str, Any]:
    """How :func:`moe_fast.inference.embed_file` reads texts, by the flags of these names.

    Raises:
        typer.BadParameter: an unknown name in ``--columns``, or one that two flags give.
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
    """(path, domain of all texts, how it is read) of ``FILE`` or ``DOMAIN=FILE``.

    Args:
        source, domain: see `file_and_domain`.
        reading: what `text_reading` says of all files.
        delimiter: value of ``--delimiter``.
    """
    path, domain, column = file_and_domain(source, domain, reading["domain_column"])
    own = {"domain_column": column, "delimiter": delimiter_for(str(path), delimiter)}
    return path, domain, reading | own


def split_commas(values: Sequence[str] | None) -> list[str]:
    """The names in ``--names a,b --names c``: a, b, c."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def numbers(values: Sequence[str] | None, flag: str, allowed: str = "whole numbers") -> list[int]:
    """The whole numbers in ``--flag 64,32``.

    Raises:
        typer.BadParameter: for anything else, saying what is allowed.
    """
    parts = split_commas(values)
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{flag} must be {allowed}; got {', '.join(parts)}")
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
