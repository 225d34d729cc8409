"""Tuning tables: tile sizes that a search found, a JSON file per GPU.

    {"gpu": "NVIDIA H200", "configs": {"up/n3072/k768/rows8192/bfloat16": {"block_m": 128, ...}}}

Tables that ship are in ``tuning/``; a user's own are in the folder that ``MOE_FAST_TUNING`` names.
Other fields of the file, such as "measured", are for its readers.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from .config import Config

SHIPPED_TABLES = Path(__file__).parent / "tuning"
OWN_TABLES = "MOE_FAST_TUNING"
_on_trial: dict[str, Mapping[str, Config]] = {}


def table_key(kernel: str, n: int, k: int, rows_per_expert: int, dtype: torch.dtype) -> str:
    """The key of a shape: ``up/n3072/k768/rows8192/bfloat16``; rows rounded to a power of two."""
    bucket = triton.next_power_of_2(max(rows_per_expert, 1))
    return f"{kernel}/n{n}/k{k}/rows{bucket}/{str(dtype).removeprefix('torch.')}"


def table_paths(gpu: str) -> list[Path]:
    """The possible paths of a GPU's tables; entries of a later one take precedence.

    A search writes to the last one, which is in the folder ``MOE_FAST_TUNING`` if that is set.
    """
    own = os.environ.get(OWN_TABLES)
    name = f"{gpu.replace(' ', '_').replace('/', '_')}.json"
    return [folder / name for folder in (SHIPPED_TABLES, *([Path(own)] if own else []))]


@functools.cache
def load_table(gpu: str) -> Mapping[str, Config]:
    """The tuning table of a GPU, read once; empty where there is none.

    Raises:
        ValueError: a file is not a table; the message names the file, the entry and the mistake.
    """
    table: dict[str, Config] = {}
    for path in table_paths(gpu):
        if path.exists():
            table |= parse_table(path.read_text(), str(path))
    return {**table, **_on_trial.get(gpu, {})}


@contextmanager
def in_use(gpu: str, table: Mapping[str, Config]) -> Iterator[None]:
    """Within the block, entries of ``table`` take precedence over those of the GPU's files."""
    _on_trial[gpu] = table
    load_table.cache_clear()
    try:
        yield
    finally:
        del _on_trial[gpu]
        load_table.cache_clear()


def add_to_table(gpu: str, found: Mapping[str, Config]) -> Path:
    """Adds ``found`` to the GPU's last table, replacing entries, and uses it in this process.

    The file is replaced atomically.
    """
    path = table_paths(gpu)[-1]
    before = parse_table(path.read_text(), str(path)) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(format_table(gpu, {**before, **found}))
    os.replace(part, path)
    load_table.cache_clear()
    return path


def parse_table(text: str, source: str) -> dict[str, Config]:
    """The table in ``text``, JSON ``{"gpu": name, "configs": {key: {block_m: ..., ...}}}``."""
    try:
        entries = json.loads(text)["configs"]
        items = entries.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{source} must be JSON with an object "configs": {error!r}.') from None
    table = {}
    for key, fields in items:
        try:
            table[key] = Config(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}, entry {key!r}: {error}") from None
    return table


def format_table(gpu: str, table: Mapping[str, Config]) -> str:
    """The JSON that :func:`parse_table` reads, with entries sorted by key."""
    configs = {key: asdict(table[key]) for key in sorted(table)}
    return json.dumps({"gpu": gpu, "configs": configs}, indent=1) + "\n"
