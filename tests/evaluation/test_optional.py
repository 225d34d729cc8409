from __future__ import annotations

import sys

import numpy as np
import pytest

from moe_fast.evaluation.bootstrap import bootstrap_bounds
from moe_fast.evaluation.ir_metrics import query_scores
from moe_fast.evaluation.plots import plot_losses


def _calls(path: str):
    return {
        "ir-measures": lambda: query_scores({}, {"q": {"d": 1}}, ["nDCG@3"]),
        "scipy": lambda: bootstrap_bounds([np.arange(2)], lambda rows: rows.mean(-1)[None]),
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
