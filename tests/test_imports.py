"""What ``import moe_fast`` loads, and what it leaves for later."""

import json
import subprocess
import sys

import pytest

import moe_fast

FORBIDDEN = (
    "sentence_transformers",
    "datasets",
    "triton",
    "typer",
    "click",
    "accelerate",
    "sklearn",
    "scipy",
    "matplotlib",
    "pandas",
)


def _modules_after(code: str) -> set[str]:
    script = f"import sys, json; {code}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


def test_no_extra_is_loaded():
    """Beyond what transformers' own models load by themselves, where anything."""
    peers = "; ".join(
        f"import transformers.models.{m}.modeling_{m}"
        for m in ("bert", "roberta", "xlm_roberta", "modernbert")
    )
    base = _modules_after(f"import torch; from transformers import AutoModel; {peers}")
    ours = _modules_after("import moe_fast")
    assert not {"sentence_transformers", "datasets"} & ours
    # Where Triton is installed, torch and transformers load it before us.
    assert not (ours - base) & set(FORBIDDEN)


def test_public_names():
    names = {
        "upcycle",
        "extract_expert",
        "from_experts",
        "add_expert",
        "remove_expert",
        "import_checkpoint",
        "MoEMLP",
        "MoEBertLayer",
        "show_backends",
        "ops",
        "losses",
    }
    assert names | {"available_backends", "use_backend", "MoESentenceTransformer"} <= set(
        moe_fast.__all__
    )
    for name in set(moe_fast.__all__) - {"MoESentenceTransformer"}:
        assert getattr(moe_fast, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="moe_fast.*has no attribute 'nothing'"):
        _ = moe_fast.nothing


def test_sentence_transformers_is_asked_for_by_name():
    code = (
        "import sys; sys.modules['sentence_transformers'] = None; import moe_fast\n"
        "try: moe_fast.MoESentenceTransformer\n"
        "except ImportError as e: print(e)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install -e '.[train]'" in result.stdout, result.stderr
