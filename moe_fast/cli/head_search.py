"""``moe-fast search`` by the three heads' outputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import file_and_reading

if TYPE_CHECKING:
    from moe_fast.data import TextRow
    from moe_fast.encoding.head_outputs import HeadOutputs
    from moe_fast.inference.head_index import HeadIndex

_QUERIES_AT_ONCE = 1024
_ALL = ("dense", "sparse", "multi_vector")


class HeadSearch:
    """The search by shared words, token vectors, or all three heads; it takes texts alone."""

    index: HeadIndex

    def __init__(
        self, options: SimpleNamespace, run: Run, reading: dict[str, Any], folder: Path
    ) -> None:
        from moe_fast.encoding.loading import load_three_heads
        from moe_fast.ops.checks import check_choice

        self.options, self.run, self.reading = options, run, reading
        self.folder = folder / "index"
        self.weights = _weights(options.weights)
        self.model: Any = None
        if options.documents is not None or options.queries is not None:
            if options.model is None:
                raise typer.BadParameter(f"--model must be given with --by {options.by}")
            self.model = load_three_heads(options.model, device=options.device)
            for name in (options.document_prompt, options.query_prompt):
                if name is not None:
                    check_choice("prompt_name", name, sorted(self.model.prompts))

    @property
    def ids(self) -> list[str]:
        """The ids of the documents."""
        return self.index.ids

    @property
    def description(self) -> str:
        """The parts of the index."""
        return "inverted index" if self.index.tokens is None else "index of three heads"

    def open_documents(self) -> None:
        """Build the index, or load it."""
        from moe_fast.encoding.lengths import counted_truncation
        from moe_fast.inference.codes import factory_of
        from moe_fast.inference.head_build import build_head_index
        from moe_fast.inference.head_index import load_head_index

        options = self.options
        if options.load_index is not None:
            self.folder = options.load_index
            self.index = load_head_index(self.folder)
            dense = self.index.dense
            if dense is not None and dense.normalize and not options.normalize:
                raise ValueError(
                    f"--no-normalize: the index in {self.folder} ranks by cosine; build it again"
                )
            return
        precision = options.precision or "float32"

        def token_factory(dimension: int) -> str:
            return factory_of(precision, dimension)

        def dense_factory(dimension: int) -> str:
            return options.index if options.precision is None else token_factory(dimension)

        domain, rows = self._rows(options.documents)
        self.folder.mkdir()
        with counted_truncation() as cut:
            self.index = build_head_index(
                rows,
                lambda chunk, outputs: self._encode(
                    chunk, outputs, domain, options.document_prompt
                ),
                self.folder,
                parts="sparse" if options.by == "sparse" else "all",
                dense_factory=dense_factory,
                token_factory=token_factory,
                normalize=options.normalize,
                pool_tokens=options.pool_tokens or 1.0,
                rescore=bool(options.rescore),
            )
        cut.warn(len(self.index.ids))

    def save(self, folder: Path) -> None:
        """Copy the index into a folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def hits(self) -> tuple[Iterator[Any], Iterable[str]]:
        """Search for the queries; also return their ids."""
        domain, rows = self._rows(self.options.queries)
        read = list(rows)
        return self._found(read, domain), [row.id for row in read]

    def _found(self, rows: list[TextRow], domain: str | None) -> Iterator[Any]:
        from moe_fast.inference.head_index import search_heads

        options = self.options
        outputs = ("sparse",) if options.by == "sparse" else _ALL
        depth = options.k + options.ignore_identical_ids
        for start in range(0, len(rows), _QUERIES_AT_ONCE):
            chunk = rows[start : start + _QUERIES_AT_ONCE]
            scores, places = search_heads(
                self.index,
                self._encode(chunk, outputs, domain, options.query_prompt),
                depth,
                by=options.by,
                candidates=max(options.candidates or 1000, depth),
                weights=self.weights,
                rescore=max(options.rescore, depth) if options.rescore else 0,
            )
            yield [row.id for row in chunk], scores, places

    def _rows(self, source: str) -> tuple[str | None, Iterator[TextRow]]:
        """Open a file of texts; returns the domain of all, and the rows."""
        from moe_fast.cli.dense_search import is_vectors
        from moe_fast.data import read_texts
        from moe_fast.data.lines import refuse
        from moe_fast.data.tables import Skipped

        options = self.options
        path, domain, reading = file_and_reading(
            source, options.domain, self.reading, options.delimiter
        )
        if is_vectors(path):
            raise typer.BadParameter(
                f"--by {options.by} needs texts, and {path} holds vectors; those of one head are "
                "searched with --by dense"
            )
        skipped = Skipped(str(path))
        invalid = skipped if reading.pop("skip_invalid") else refuse
        return domain, self._all(read_texts(path, **reading, invalid=invalid), skipped)

    def _all(self, rows: Iterator[TextRow], skipped: Any) -> Iterator[TextRow]:
        yield from rows
        if skipped.count:
            self.run.say(f"{skipped.source}: {skipped.summary()}")

    def _encode(
        self,
        rows: list[TextRow],
        outputs: tuple[str, ...],
        domain: str | None,
        prompt_name: str | None,
    ) -> HeadOutputs:
        from moe_fast.inference.chunks import domains_of_rows

        options: dict[str, Any] = {}
        domains = domains_of_rows(rows) or domain
        if domains is not None:
            options["domain"] = domains
        return self.model.encode(
            [row.text for row in rows],
            outputs=outputs,
            prompt_name=prompt_name,
            batch_size=self.options.batch_size,
            truncate=self.options.truncate,
            **options,
        )


def _weights(text: str | None) -> tuple[float, ...]:
    """Parse ``1,0.3,1``."""
    from moe_fast.encoding.head_outputs import SCORE_WEIGHTS

    if text is None:
        return SCORE_WEIGHTS
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not any(values):
        raise typer.BadParameter(
            f"--weights must be three numbers, not all 0, such as 1,0.3,1; got {text}"
        )
    return values
