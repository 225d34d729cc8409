"""``moe-fast search``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    file_and_reading,
    text_reading,
)

if TYPE_CHECKING:
    from moe_fast.inference.index import VectorIndex
    from moe_fast.inference.vectors import Vectors

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
    """Build a faiss index, exact by default, and search it; writes a TREC run file.

    Ids are those of the files' id or _id column (beside .npy: of its file of ids), or row numbers
    from 0.
    """
    from moe_fast.evaluation import write_run
    from moe_fast.files import atomic_folder, check_output
    from moe_fast.inference import EncoderSettings, embed_file, open_vectors
    from moe_fast.inference import index as library

    if (documents is None) == (load_index is None):
        raise typer.BadParameter("give --documents or --load-index, one of the two")
    if (queries is None) != (output is None):
        raise typer.BadParameter("give --queries and --output together")
    if queries is None and save_index is None:
        raise typer.BadParameter("nothing to do: give --queries and --output, or --save-index")
    reading = text_reading(columns, text_column, domain_column, skip_invalid)
    check_delimiter(delimiter, [source for source in (documents, queries) if source is not None])
    if load_index is not None and index != "Flat":
        raise typer.BadParameter(f"--index {index} is for --documents; a saved index has its own")
    for path in (output, save_index):
        if path is not None:
            check_output(path, overwrite)
    library.require_faiss()

    def vectors_of(source: str, prompt_name: str | None, embedded: Path) -> Vectors:
        path, own_domain, own_reading = file_and_reading(source, domain, reading, delimiter)
        if _is_vectors(path):
            vectors = open_vectors(path)
            if not vectors.has_ids:
                run.say(f"{path}: there are no ids beside it; they are the row numbers, from 0")
            return vectors
        if model is None:
            raise typer.BadParameter(f"--model must be given to embed the texts in {path}")
        settings = EncoderSettings(
            model=model,
            domain=own_domain,
            prompt_name=prompt_name,
            batch_size=batch_size,
            truncate=truncate,
            device=device,
        )
        embed_file(path, embedded, settings, **own_reading, progress=not run.quiet)
        return open_vectors(embedded)

    with tempfile.TemporaryDirectory() as folder:
        if load_index is not None:
            built = library.load_index(load_index)
            if built.normalize and not normalize:
                raise ValueError(
                    f"--no-normalize: the index in {load_index} ranks by cosine; build it again"
                )
        else:
            assert documents is not None
            found = vectors_of(documents, document_prompt, Path(folder, "documents.parquet"))
            built = library.build_index(found, factory=index, normalize=normalize)
        if save_index is not None:
            with atomic_folder(save_index, replaces=("*",)) as temporary:
                library.save_index(built, temporary)
                run.save_settings(temporary)
            run.say(f"{save_index}: {len(built.ids):,} documents, index {built.factory}")
        if queries is not None and output is not None:
            asked = vectors_of(queries, query_prompt, Path(folder, "queries.parquet"))
            hits, own = _hits(built, asked, k, ignore_identical_ids)
            run.save_settings(output)
            write_run(hits, output, tag=tag)
            run.say(f"{output}: {len(hits):,} queries, {sum(map(len, hits.values())):,} hits")
            if own:
                run.say(
                    f"{own:,} documents with their query's own id are left out "
                    "(--keep-identical-ids keeps them)"
                )


def _is_vectors(path: Path) -> bool:
    """Return whether a file holds vectors, by its name and, for Parquet, its columns.

    A folder holds vectors that ``embed --engine ray`` has written.
    """
    if path.is_dir():
        return True
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        return "embedding" in pq.read_schema(path).names
    return path.suffix == ".npy"


def _hits(
    built: VectorIndex, queries: Vectors, k: int, ignore_own: bool
) -> tuple[dict[str, dict[str, float]], int]:
    """Search, and return {query id: {document id: score}}, best first, and a count.

    The count is the number of documents left out because they have the id of their query. None is
    left out if the ids are row numbers.
    """
    from moe_fast.inference.index import search_index

    of_queries = (key for keys, _ in queries.pieces() for key in keys)
    numbers = _are_row_numbers(built.ids) or _are_row_numbers(of_queries)
    ignore_own = ignore_own and not numbers
    found: dict[str, dict[str, float]] = {}
    left_out = 0
    for ids, vectors in queries.pieces():
        scores, rows = search_index(built, vectors, k + ignore_own)
        for query, of_query, places in zip(ids, scores.tolist(), rows.tolist(), strict=True):
            if query in found:
                raise ValueError(f"{queries.path}: query id {query!r} is there twice")
            ranked = zip(places, of_query, strict=True)
            hits = {built.ids[place]: score for place, score in ranked if place >= 0}
            if ignore_own and hits.pop(query, None) is not None:
                left_out += 1
            found[query] = dict(list(hits.items())[:k])
    return found, left_out


def _are_row_numbers(ids: Iterable[str]) -> bool:
    """Return whether ids are row numbers; equal ones do not mean that the texts are the same."""
    return all(key == str(row) for row, key in enumerate(ids))
