"""``moe-fast mine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    BatchSize,
    Columns,
    Delimiter,
    Device,
    Output,
    Overwrite,
    SkipInvalid,
    Truncate,
    check_delimiter,
    delimiter_for,
    option,
)

EXAMPLE = "moe-fast mine pairs.jsonl --model mixture --negatives 2 --max-ratio 2 -o mined.jsonl"
_SEARCH, _LEAVE_OUT = "Search", "What is left out"


def run_command(
    data: Annotated[
        list[str],
        typer.Argument(help="Files of pairs, or of FlagEmbedding rows without neg; DOMAIN=FILE."),
    ],
    *,
    output: Output,
    model: Annotated[
        str | None, option(_SEARCH, "Folder or hub id of the model that ranks the documents.")
    ] = None,
    bm25: Annotated[
        bool, option(_SEARCH, "Rank the documents by words (BM25) instead.", "--bm25")
    ] = False,
    corpus: Annotated[
        Path | None, option(_SEARCH, "File of texts to search besides all rows' positives.")
    ] = None,
    negatives: Annotated[int, option(_SEARCH, "Largest number of negatives per row.", min=1)] = 7,
    depth: Annotated[
        int,
        option(_SEARCH, "Number of highest-ranked documents per query that are considered.", min=1),
    ] = 100,
    sample: Annotated[
        bool,
        option(
            _SEARCH,
            "Draw the negatives at random from the considered documents, instead of taking the "
            "first.",
            "--sample",
        ),
    ] = False,
    skip: Annotated[
        int,
        option(_LEAVE_OUT, "Number of highest-ranked documents per query to skip.", min=0),
    ] = 0,
    max_ratio: Annotated[
        float,
        option(
            _LEAVE_OUT,
            "Leave out documents whose score exceeds this share of the best positive's score; 0: "
            "no limit.",
        ),
    ] = 0.95,
    margin: Annotated[
        float | None,
        option(
            _LEAVE_OUT,
            "Leave out documents whose score is not lower than the best positive's by at least "
            "this much.",
        ),
    ] = None,
    group_column: Annotated[
        str | None,
        option(_LEAVE_OUT, "Leave out positives of rows with the same value in this column."),
    ] = None,
    same_domain: Annotated[
        bool,
        option(
            _LEAVE_OUT, "Leave out documents of other domains than the query's.", "--same-domain"
        ),
    ] = False,
    known_queries: Annotated[
        bool,
        option(_LEAVE_OUT, "Leave out documents whose own query is not known.", "--known-queries"),
    ] = False,
    positives_only: Annotated[
        bool, option(_LEAVE_OUT, "Leave out pairs with label 0.", "--positives-only")
    ] = False,
    columns: Columns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    query_prompt: Annotated[
        str | None, option(_SEARCH, "Name of the model's prompt for queries.")
    ] = None,
    document_prompt: Annotated[
        str | None, option(_SEARCH, "Name of the model's prompt for documents.")
    ] = None,
    batch_size: BatchSize = 32,
    truncate: Truncate = False,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Find hard negatives for training, and write FlagEmbedding rows.

    The column neg_q has the query of each negative, if all of them are known.
    """
    from moe_fast.cli.training_data import read_data
    from moe_fast.data import MiningSettings, mine_hard_negatives, write_flag_rows
    from moe_fast.files import check_output, exclusive

    if (model is None) != bm25:
        raise typer.BadParameter("give --model or --bm25, one of the two")
    check_output(output, overwrite)
    run.held.enter_context(exclusive(output))
    settings = MiningSettings(
        num_negatives=negatives,
        depth=depth,
        skip=skip,
        max_ratio=max_ratio or None,
        margin=margin,
        group=group_column,
        same_domain=same_domain,
        known_queries=known_queries,
        sample=sample,
        seed=run.seed,
    )
    check_delimiter(delimiter, [*data, str(corpus)])
    rows = read_data(
        data,
        positives_only,
        keep=[group_column] if group_column else [],
        columns=columns,
        delimiter=delimiter,
        skip_invalid=skip_invalid,
    )
    if "neg" in rows.column_names and not any(rows["neg"]):
        rows = rows.remove_columns("neg")  # empty lists that the reader has added
    retriever, options = _retriever(
        model,
        device,
        batch_size=batch_size,
        truncate=truncate,
        query_prompt_name=query_prompt,
        document_prompt_name=document_prompt,
        show_progress_bar=not run.quiet,
    )
    mined = mine_hard_negatives(
        rows,
        retriever,
        settings=settings,
        corpus=_corpus(corpus, delimiter),
        encode_options=options,
    )
    run.save_settings(output)
    write_flag_rows(mined.rows, output)
    _say(mined.report, output, "neg_q" in mined.rows[0], run)


def _retriever(model: str | None, device: str | None, **options: Any) -> tuple[Any, Any]:
    """Return the retriever and the encode options for mine_hard_negatives."""
    if model is None:
        from moe_fast.data.mining import BM25

        return BM25, None
    from moe_fast.encoding.options import EncodeOptions
    from moe_fast.inference import load_model

    return load_model(model, device=device), EncodeOptions(**options)


def _corpus(path: Path | None, delimiter: str | None) -> list[str]:
    from moe_fast.data import read_texts

    if path is None:
        return []
    rows = read_texts(path, delimiter=delimiter_for(str(path), delimiter))
    texts = [row.text for row in rows]
    if not texts:
        raise ValueError(f"{path}: no texts")
    return texts


def _say(report: Any, output: Path, with_queries: bool, run: Run) -> None:
    run.say(
        f"{output}: {report.rows:,} rows with {report.negatives:,} negatives out of "
        f"{report.documents:,} documents{', and their queries' if with_queries else ''}"
    )
    reasons = {name: count for name, count in report.left_out.items() if count}
    run.say("left out: " + (", ".join(f"{n:,} {name}" for name, n in reasons.items()) or "nothing"))
    if report.short_rows:
        run.say(f"{report.short_rows:,} rows have fewer negatives than asked for")
    if report.lost_rows:
        run.say(f"{report.lost_rows:,} rows have none and are not in the file")
