"""``moe-fast search`` by one vector per text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import file_and_reading

if TYPE_CHECKING:
    from moe_fast.inference.index import VectorIndex
    from moe_fast.inference.vectors import Vectors


class DenseSearch:
    """The search by one vector per text, of texts or of files of vectors."""

    index: VectorIndex

    def __init__(
        self, options: SimpleNamespace, run: Run, reading: dict[str, Any], folder: Path
    ) -> None:
        self.options, self.run, self.reading, self.folder = options, run, reading, folder

    @property
    def ids(self) -> list[str]:
        """The ids of the documents."""
        return self.index.ids

    @property
    def description(self) -> str:
        """The kind of index."""
        return f"index {self.index.factory}"

    def open_documents(self) -> None:
        """Build the index, or load it."""
        from moe_fast.inference.codes import factory_of
        from moe_fast.inference.head_index import DENSE, HEADS
        from moe_fast.inference.index import build_index, load_index

        options = self.options
        if options.load_index is not None:
            of_heads = (options.load_index / HEADS).is_file()
            self.index = load_index(options.load_index / DENSE if of_heads else options.load_index)
            if self.index.normalize and not options.normalize:
                raise ValueError(
                    f"--no-normalize: the index in {options.load_index} ranks by cosine; build it "
                    "again"
                )
            return
        found = self._vectors(options.documents, options.document_prompt, "documents.parquet")
        factory = options.index
        if options.precision is not None:
            factory = factory_of(options.precision, found.dimension)
        self.index = build_index(
            found,
            factory=factory,
            normalize=options.normalize,
            keep_vectors=self.folder / "vectors" if options.rescore else None,
        )

    def save(self, folder: Path) -> None:
        """Write the index into a folder."""
        from moe_fast.inference.index import save_index

        save_index(self.index, folder)

    def hits(self) -> tuple[Iterator[Any], Iterable[str]]:
        """Search for the queries; also return their ids."""
        from moe_fast.inference.index import search_index

        options = self.options
        asked = self._vectors(options.queries, options.query_prompt, "queries.parquet")
        depth = options.k + options.ignore_identical_ids
        rescore = max(options.rescore, depth) if options.rescore else 0
        found = (
            (ids, *search_index(self.index, vectors, depth, rescore=rescore))
            for ids, vectors in asked.pieces()
        )
        return found, (key for keys, _ in asked.pieces() for key in keys)

    def _vectors(self, source: str, prompt_name: str | None, name: str) -> Vectors:
        """Open a file of vectors, or embed a file of texts into a new one."""
        from moe_fast.inference import EncoderSettings, embed_file, open_vectors

        options = self.options
        path, domain, reading = file_and_reading(
            source, options.domain, self.reading, options.delimiter
        )
        if is_vectors(path):
            vectors = open_vectors(path)
            if not vectors.has_ids:
                self.run.say(
                    f"{path}: there are no ids beside it; they are the row numbers, from 0"
                )
            return vectors
        if options.model is None:
            raise typer.BadParameter(f"--model must be given to embed the texts in {path}")
        settings = EncoderSettings(
            model=options.model,
            domain=domain,
            prompt_name=prompt_name,
            batch_size=options.batch_size,
            truncate=options.truncate,
            device=options.device,
        )
        embedded = self.folder / name
        embed_file(path, embedded, settings, **reading, progress=not self.run.quiet)
        return open_vectors(embedded)


def is_vectors(path: Path) -> bool:
    """Return whether a file holds vectors, by its name and, for Parquet, its columns.

    A folder holds vectors that ``embed --engine ray`` has written.
    """
    if path.is_dir():
        return True
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        return "embedding" in pq.read_schema(path).names
    return path.suffix == ".npy"
