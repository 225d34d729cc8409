"""``moe-fast cocite``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    Columns,
    Delimiter,
    Output,
    Overwrite,
    SkipInvalid,
    check_delimiter,
    column_names,
    delimiter_for,
    split_commas,
)

EXAMPLE = "moe-fast cocite papers.jsonl --fractions .5,.5,0 -o cited-pairs"
_FRACTIONS = [".8,.1,.1"]


def run_command(
    papers: Annotated[
        Path,
        typer.Argument(
            help="File of papers: id, abstract, citing or cited_by, and optionally domain."
        ),
    ],
    *,
    output: Output,
    min_cocitations: Annotated[
        int, typer.Option(min=1, help="Number of papers that must cite both papers of a positive.")
    ] = 1,
    negatives_per_positive: Annotated[
        int,
        typer.Option(
            min=0, help="Negative pairs per positive pair; with 0 the pairs have no labels."
        ),
    ] = 1,
    fractions: Annotated[
        list[str], typer.Option(help="Shares of the papers in train, dev and test.")
    ] = _FRACTIONS,
    max_references: Annotated[
        int | None, typer.Option(min=2, help="Ignore papers with more references than this.")
    ] = None,
    max_pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Draw this many positive pairs at random if there are more."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Add the columns a_id and b_id.")] = False,
    file_format: Annotated[
        Literal["jsonl", "csv", "parquet"],
        typer.Option("--format", help="Format of the files to write."),
    ] = "jsonl",
    columns: Columns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Make training pairs of papers that are cited together; no paper is in two splits.

    Writes a folder with one file of pairs per split and the counts, report.json.
    """
    from moe_fast.data import cocitation_pairs, write_pairs
    from moe_fast.files import atomic_folder, check_output

    try:
        shares = [float(part) for part in split_commas(fractions)]
    except ValueError as error:
        raise typer.BadParameter(f"--fractions must be numbers; got {fractions}") from error
    check_delimiter(delimiter, [str(papers)])
    check_output(output, overwrite)
    pairs = cocitation_pairs(
        papers,
        columns=column_names(columns),
        delimiter=delimiter_for(str(papers), delimiter),
        skip_invalid=skip_invalid,
        min_cocitations=min_cocitations,
        negatives_per_positive=negatives_per_positive,
        fractions=shares,
        max_references=max_references,
        max_pairs=max_pairs,
        ids=ids,
        seed=run.seed,
    )
    report = pairs.report.to_dict()
    with atomic_folder(output, replaces=("*",)) as temporary:
        for split, rows in pairs.splits.items():
            write_pairs(rows, temporary / f"{split}.{file_format}")
        (temporary / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        run.save_settings(temporary)
    for name, value in report.items():
        run.say(f"{name}: {value}")
