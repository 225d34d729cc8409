from __future__ import annotations

import sys

import numpy as np
import pytest

from moe_fast.evaluation import bootstrap_interval, retrieval_scores
from moe_fast.evaluation.plots import plot_losses


def _calls(path: str):
    vectors = np.ones((2, 2), np.float32)
    return {
        "ir-measures": lambda: retrieval_scores(vectors, vectors, [{0: 1}, {1: 1}]),
        "scipy": lambda: bootstrap_interval([1.0, 2.0]),
        "matplotlib": lambda: plot_losses({"x": [(0, 1.0)]}, path),
    }


@pytest.mark.parametrize("library", ["ir-measures", "scipy", "matplotlib"])
def test_a_missing_library_names_the_extra(
    library: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = library.replace("-", "_")
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # makes any import of it an ImportError
    with pytest.raises(ImportError, match=rf"{library}.*pip install -e '.\[eval\]'"):
        _calls(str(tmp_path / "x.png"))[library]()
