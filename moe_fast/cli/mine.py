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
    model: Annotated[str | None, option(_SEARCH, "Model folder or hub id that ranks.")] = None,
    bm25: Annotated[bool, option(_SEARCH, "Rank by words instead.", "--bm25")] = False,
    corpus: Annotated[
        Path | None, option(_SEARCH, "Texts to search beside all rows' positives.")
    ] = None,
    negatives: Annotated[int, option(_SEARCH, "Per row, at most.", min=1)] = 7,
    depth: Annotated[int, option(_SEARCH, "Best ranked that are looked at.", min=1)] = 100,
    sample: Annotated[
        bool, option(_SEARCH, "Draw from them, instead of the first.", "--sample")
    ] = False,
    skip: Annotated[int, option(_LEAVE_OUT, "Best ranked to pass over.", min=0)] = 0,
    max_ratio: Annotated[
        float, option(_LEAVE_OUT, "Scores above this share of the best positive's; 0: no limit.")
    ] = 0.95,
    margin: Annotated[
        float | None, option(_LEAVE_OUT, "Scores less than this below the best positive's.")
    ] = None,
    group_column: Annotated[
        str | None, option(_LEAVE_OUT, "Positives of rows with the same value in this column.")
    ] = None,
    same_domain: Annotated[
        bool, option(_LEAVE_OUT, "Other domains than the query's.", "--same-domain")
    ] = False,
    known_queries: Annotated[
        bool, option(_LEAVE_OUT, "Texts whose query is not known.", "--known-queries")
    ] = False,
    positives_only: Annotated[
        bool, option(_LEAVE_OUT, "Pairs with label 0.", "--positives-only")
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
    """Find hard negatives for training; writes FlagEmbedding rows.

    Each negative's own query goes with it, as neg_q, where all of them are known.
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
        rows = rows.remove_columns("neg")  # the reader's empty lists
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
    """What mine_hard_negatives takes: a model and how to call it, or BM25."""
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
