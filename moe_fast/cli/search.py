"""``moe-fast search``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import TEXT, BatchSize, Device, Overwrite, TextColumn, Truncate

if TYPE_CHECKING:
    from moe_fast.inference.encoder import EncoderSettings
    from moe_fast.inference.vectors import Vectors

EXAMPLE = (
    "moe-fast search --model mixture --domain law --documents texts.jsonl --queries queries.jsonl "
    "-o run.trec"
)


def run_command(
    *,
    documents: Annotated[
        Path | None,
        typer.Option(help="Texts to embed, or vectors that embed has written (.npy, .parquet)."),
    ] = None,
    load_index: Annotated[
        Path | None, typer.Option(help="A saved index, instead of --documents.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Texts, or vectors. Without: build and save the index.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Embeds what is texts.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="TREC run file to write.")
    ] = None,
    save_index: Annotated[Path | None, typer.Option(help="Folder to keep the index in.")] = None,
    index: Annotated[
        str, typer.Option(help="faiss' factory string, e.g. IVF256,Flat; Flat is exact.")
    ] = "Flat",
    normalize: Annotated[
        bool, typer.Option(help="Rank by cosine; otherwise by dot product.")
    ] = True,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Documents per query.")] = 100,
    tag: Annotated[str, typer.Option(help="Name of the run, its last column.")] = "moe_fast",
    text_column: TextColumn = TEXT,
    domain: Annotated[
        str | None, typer.Option(help="Domain of all texts, where there is no --domain-column.")
    ] = None,
    domain_column: Annotated[
        str | None, typer.Option(help="Column with each text's domain, in both files.")
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Name of the model's prompt for documents.")
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Name of the model's prompt for queries.")
    ] = None,
    batch_size: BatchSize = 32,
    truncate: Truncate = False,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Build a faiss index, exact by default, and search it; writes a TREC run file.

    Ids are those of the files' id or _id column, or row numbers from 0.
    """
    from moe_fast.evaluation import write_run
    from moe_fast.files import check_output
    from moe_fast.inference import index as library

    _check_combination(documents, load_index, queries, output, save_index)
    if load_index is not None and index != "Flat":
        raise typer.BadParameter(f"--index {index} is for --documents; a saved index has its own")
    for path in (output, save_index):
        if path is not None:
            check_output(path, overwrite)
    library.require_faiss()

    def vectors_of(path: Path, prompt_name: str | None, folder: str) -> Vectors:
        from moe_fast.inference.encoder import EncoderSettings

        if model is None and not _is_vectors(path):
            raise typer.BadParameter(f"--model must be given to embed the texts in {path}")
        settings = EncoderSettings(
            model=model or "",
            domain=domain,
            prompt_name=prompt_name,
            batch_size=batch_size,
            truncate=truncate,
            device=device,
        )
        reading = {"columns": tuple(text_column), "domain_column": domain_column}
        return _vectors(path, settings, reading, Path(folder), progress=not run.quiet)

    with tempfile.TemporaryDirectory() as folder:
        if load_index is not None:
            built = library.load_index(load_index)
            if built.normalize and not normalize:
                raise ValueError(
                    f"--no-normalize: the index in {load_index} ranks by cosine; build it again"
                )
        else:
            assert documents is not None
            built = library.build_index(
                vectors_of(documents, document_prompt, folder), factory=index, normalize=normalize
            )
        if save_index is not None:
            library.save_index(built, save_index)
            run.save_settings(save_index)
            run.say(f"{save_index}: {len(built.ids):,} documents, index {built.factory}")
        if queries is not None and output is not None:
            asked = vectors_of(queries, query_prompt, folder)
            found = dict(_results(built, asked, k))
            write_run(found, output, tag=tag)
            run.save_settings(output)
            run.say(f"{output}: {len(found):,} queries, {sum(map(len, found.values())):,} hits")


def _check_combination(
    documents: Path | None,
    load_index: Path | None,
    queries: Path | None,
    output: Path | None,
    save_index: Path | None,
) -> None:
    if (documents is None) == (load_index is None):
        raise typer.BadParameter("give --documents or --load-index, one of the two")
    if (queries is None) != (output is None):
        raise typer.BadParameter("give --queries and --output together")
    if queries is None and save_index is None:
        raise typer.BadParameter("nothing to do: give --queries and --output, or --save-index")


def _is_vectors(path: Path) -> bool:
    """Whether the file holds vectors, by its name and, for Parquet, its columns."""
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        return "embedding" in pq.read_schema(path).names
    return path.suffix == ".npy"


def _vectors(
    path: Path, settings: EncoderSettings, reading: dict[str, Any], folder: Path, *, progress: bool
) -> Vectors:
    """The vectors in a file, or of the texts in it."""
    from moe_fast.inference.embed import embed_file
    from moe_fast.inference.vectors import open_vectors

    if _is_vectors(path):
        return open_vectors(path)
    embedded = folder / f"{len(list(folder.iterdir()))}.parquet"
    embed_file(path, embedded, settings, **reading, progress=progress)
    return open_vectors(embedded)


def _results(built: Any, queries: Vectors, k: int) -> Iterator[tuple[str, dict[str, float]]]:
    """(query id, {document id: score}, best first) of every query."""
    from moe_fast.inference.index import search_index

    seen: set[str] = set()
    for ids, vectors in queries.pieces():
        for query in ids:
            if query in seen:
                raise ValueError(f"{queries.path}: query id {query!r} is there twice")
            seen.add(query)
        scores, rows = search_index(built, vectors, k)
        for query, row_scores, row in zip(ids, scores.tolist(), rows.tolist(), strict=True):
            hits = zip(row, row_scores, strict=True)
            yield query, {built.ids[place]: score for place, score in hits if place >= 0}
