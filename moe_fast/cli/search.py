"""``moe-fast search``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    TEXT,
    BatchSize,
    Delimiter,
    Device,
    Domain,
    DomainColumn,
    Overwrite,
    SkipInvalid,
    TextColumn,
    TextColumns,
    Truncate,
    check_delimiter,
    option,
    text_reading,
)

_HEADS, _CODES = "Three heads", "Bytes and quality"

EXAMPLE = (
    "moe-fast search --model mixture --domain law --documents texts.jsonl --queries queries.jsonl "
    "-o run.trec"
)


def run_command(
    *,
    documents: Annotated[
        str | None,
        typer.Option(
            help="File of texts to embed (DOMAIN=FILE gives them a domain), or vectors that embed "
            "has written (.npy, .parquet, a folder)."
        ),
    ] = None,
    load_index: Annotated[
        Path | None,
        typer.Option(help="Folder that --save-index has written, instead of --documents."),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="File of texts or vectors, as for --documents; without it the index is only built "
            "and saved."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model that embeds texts; vectors need none."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="TREC run file to write (.trec, .run, .txt, each also .gz, or no suffix): query, "
            "Q0, document, rank, score, tag.",
        ),
    ] = None,
    save_index: Annotated[Path | None, typer.Option(help="Folder to keep the index in.")] = None,
    index: Annotated[
        str,
        typer.Option(help="faiss' factory string: Flat is exact, IVF256,Flat or HNSW32 are not."),
    ] = "Flat",
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize", help="Rank by cosine; otherwise by the dot product."
        ),
    ] = True,
    by: Annotated[
        Literal["dense", "sparse", "multi", "hybrid"],
        option(
            _HEADS,
            "Score: of the dense vectors; or, of a model with three heads, of shared words "
            "(sparse), of token vectors (multi), or the weighted sum of all three (hybrid).",
        ),
    ] = "dense",
    candidates: Annotated[
        int | None,
        option(
            _HEADS,
            "For multi and hybrid: documents that the dense and the sparse search each propose; "
            "by default 1000.",
            min=1,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        option(_HEADS, "For hybrid: weights of dense, sparse and multi; by default 1,0.3,1."),
    ] = None,
    pool_tokens: Annotated[
        float | None,
        option(
            _HEADS,
            "For multi and hybrid: merge a document's token vectors, so that one of this number is "
            "left, such as 2; by default all are kept.",
            min=1,
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8", "pq", "binary"] | None,
        option(
            _CODES,
            "How the index keeps vectors, also those of tokens: in 4, 2 or 1 bytes a number, by "
            "product quantisation (a quarter of a byte) or as bits; by default float32.",
        ),
    ] = None,
    rescore: Annotated[
        int,
        option(
            _CODES,
            "Score this many of the best documents again by the vectors themselves, which are kept "
            "on the disk beside the index; 0: none.",
            min=0,
        ),
    ] = 0,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Documents per query, at most.")] = 100,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids/--keep-identical-ids",
            help="Leave out the document with the query's own id, as BEIR does; row numbers are no "
            "ids.",
        ),
    ] = True,
    tag: Annotated[
        str, typer.Option(help="Name of the run, the last column of the run file.")
    ] = "moe_fast",
    text_column: TextColumn = TEXT,
    domain: Domain = None,
    domain_column: DomainColumn = None,
    columns: TextColumns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    document_prompt: Annotated[
        str | None, typer.Option(help="Name of the model's prompt to put before documents.")
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Name of the model's prompt to put before queries.")
    ] = None,
    batch_size: BatchSize = 32,
    truncate: Truncate = True,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Build an index, exact by default, and search it; writes a TREC run file.

    Ids are those of the files' id or _id column (beside .npy: of its file of ids), or row numbers
    from 0.
    """
    from moe_fast.cli.dense_search import DenseSearch
    from moe_fast.cli.head_search import HeadSearch
    from moe_fast.evaluation import write_run
    from moe_fast.files import atomic_folder, check_output
    from moe_fast.inference.codes import require_faiss

    options = SimpleNamespace(**run.settings)
    _check_flags(options)
    reading = text_reading(columns, text_column, domain_column, skip_invalid)
    check_delimiter(delimiter, [source for source in (documents, queries) if source is not None])
    for path in (output, save_index):
        if path is not None:
            check_output(path, overwrite)
    require_faiss()
    with tempfile.TemporaryDirectory() as folder:
        kind = DenseSearch if by == "dense" else HeadSearch
        search: Any = kind(options, run, reading, Path(folder))
        search.open_documents()
        if save_index is not None:
            with atomic_folder(save_index, replaces=("*",)) as temporary:
                search.save(temporary)
                run.save_settings(temporary)
            run.say(f"{save_index}: {len(search.ids):,} documents, {search.description}")
        if queries is not None and output is not None:
            found, query_ids = search.hits()
            hits, own = as_run(found, search.ids, query_ids, k, ignore_identical_ids, queries)
            run.save_settings(output)
            write_run(hits, output, tag=tag)
            run.say(f"{output}: {len(hits):,} queries, {sum(map(len, hits.values())):,} hits")
            if own:
                run.say(
                    f"{own:,} documents with their query's own id are left out "
                    "(--keep-identical-ids keeps them)"
                )


def _check_flags(options: SimpleNamespace) -> None:
    """Raise typer.BadParameter for flags that do not go together."""
    if (options.documents is None) == (options.load_index is None):
        raise typer.BadParameter("give --documents or --load-index, one of the two")
    if (options.queries is None) != (options.output is None):
        raise typer.BadParameter("give --queries and --output together")
    if options.queries is None and options.save_index is None:
        raise typer.BadParameter("nothing to do: give --queries and --output, or --save-index")
    if options.load_index is not None:
        for flag, value in (
            ("index", options.index if options.index != "Flat" else None),
            ("precision", options.precision),
            ("pool-tokens", options.pool_tokens),
        ):
            if value is not None:
                raise typer.BadParameter(
                    f"--{flag} {value} is for --documents; a saved index has its own"
                )
    if options.index != "Flat" and options.precision is not None:
        raise typer.BadParameter("give --index or --precision, not both")
    if options.rescore and options.rescore < options.k:
        raise typer.BadParameter(f"--rescore must be at least -k {options.k}; or 0")
    for name, known in (
        ("candidates", ("multi", "hybrid")),
        ("pool_tokens", ("multi", "hybrid")),
        ("weights", ("hybrid",)),
    ):
        if getattr(options, name) is not None and options.by not in known:
            flag = name.replace("_", "-")
            raise typer.BadParameter(f"--{flag} is for --by {', '.join(known)}; got {options.by}")
    if options.by == "sparse" and (options.rescore or options.precision or options.index != "Flat"):
        raise typer.BadParameter("--precision, --index and --rescore are not for --by sparse")


def as_run(
    found: Iterable[tuple[list[str], Any, Any]],
    documents: list[str],
    query_ids: Iterable[str],
    k: int,
    ignore_own: bool,
    source: str,
) -> tuple[dict[str, dict[str, float]], int]:
    """Return {query id: {document id: score}}, best first, and a count.

    ``found`` has the ids of some queries, and the scores and rows of their documents, [Q, k] each.
    The count is the number of documents left out because they have the id of their query. None is
    left out if the ids are row numbers.
    """
    numbers = _are_row_numbers(documents) or _are_row_numbers(query_ids)
    ignore_own = ignore_own and not numbers
    run: dict[str, dict[str, float]] = {}
    left_out = 0
    for ids, scores, rows in found:
        for query, of_query, places in zip(ids, scores.tolist(), rows.tolist(), strict=True):
            if query in run:
                raise ValueError(f"{source}: query id {query!r} is there twice")
            ranked = zip(places, of_query, strict=True)
            hits = {documents[place]: score for place, score in ranked if place >= 0}
            if ignore_own and hits.pop(query, None) is not None:
                left_out += 1
            run[query] = dict(list(hits.items())[:k])
    return run, left_out


def _are_row_numbers(ids: Iterable[str]) -> bool:
    """Return whether ids are row numbers; equal ones do not mean that the texts are the same."""
    return all(key == str(row) for row, key in enumerate(ids))
