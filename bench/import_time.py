"""The time of ``import moe_fast`` over that of the libraries it builds on, in fresh processes.

The baseline imports torch, transformers' ``AutoModel`` and the ``modeling_*`` modules whose classes
moe_fast subclasses. Ours must not load any of ``FORBIDDEN`` in addition.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from moe_fast.architectures import ARCHITECTURES

from .cases import OURS, Candidates, Case, WrongResult
from .harness import ROOT

BASELINE = "torch + transformers"
BUILT_ON = dict.fromkeys(a.dense_layer.__module__ for a in ARCHITECTURES)
IMPORTS = {
    BASELINE: "\n".join(
        ["import torch", "from transformers import AutoModel", *(f"import {m}" for m in BUILT_ON)]
    ),
    OURS: "import moe_fast",
}
FORBIDDEN = {"sentence_transformers", "datasets", "accelerate", "triton", "sklearn", "matplotlib"}
FORBIDDEN |= {"typer", "click"}


def cases(size: str) -> Iterator[Case]:
    """Yield the only case; it does not depend on ``size``."""
    runs: dict[str, Callable[[], Any]] = {
        name: partial(loaded_modules, code) for name, code in IMPORTS.items()
    }
    yield Case("import", {}, "", lambda: Candidates(runs, check), baseline=BASELINE)


def loaded_modules(imports: str) -> set[str]:
    """Return the top-level modules that a fresh process has after ``imports``.

    Raises ``RuntimeError`` if the process fails.
    """
    code = f"{imports}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the importing process failed:\n{done.stderr}")
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def check(outputs: dict[str, Any]) -> None:
    """Raise ``WrongResult`` if ours loads a forbidden module that the baseline does not load."""
    if extra := sorted(outputs[OURS] & FORBIDDEN - outputs[BASELINE]):
        raise WrongResult(f"import moe_fast must load none of {sorted(FORBIDDEN)}; loads {extra}.")
