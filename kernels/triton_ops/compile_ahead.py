"""Compiles the kernels of launches in parallel, without launching them.

Triton's passes and the assembler release Python's lock, so that threads compile at the same time.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

_parse_lock = threading.Lock()


@contextmanager
def parsing_in_turn() -> Iterator[None]:
    """Within the block, run one ``ast.parse`` at a time.

    Python 3.11 counts the depth of its recursion for all threads together.
    """
    parse = ast.parse

    def locked(*args: Any, **kwargs: Any) -> Any:
        with _parse_lock:
            return parse(*args, **kwargs)

    with mock.patch.object(ast, "parse", locked):
        yield


def compile_ahead(
    launches: Sequence[Callable[[], object]], workers: int
) -> list[list[Any] | Exception]:
    """Compile what each of the launches needs; ``workers`` kernels at a time.

    The launches run with everything but their kernels: what they read and return is undefined.

    Returns:
        For each launch its compiled kernels, or the error that it or one of its kernels raised.
    """
    compiled: list[list[Any]] = []
    refused: dict[int, Exception] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled[-1].append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with (
        parsing_in_turn(),
        ThreadPoolExecutor(workers) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for number, launch in enumerate(launches):
            compiled.append([])
            try:
                launch()
            except Exception as error:  # the launcher does not take such a configuration
                refused[number] = error
    return [refused.get(n) or _finished(kernels) for n, kernels in enumerate(compiled)]


def _finished(kernels: Sequence[Any]) -> list[Any] | Exception:
    """The kernels themselves, for they may still be promises; or the error of the first."""
    try:
        return [k.result() if hasattr(k, "result") else k for k in kernels]
    except Exception as error:
        return error
