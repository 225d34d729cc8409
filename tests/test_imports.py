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


def _run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = """
import sys, json
import torch
from transformers import AutoModel
{peers}
before = set(sys.modules)
import moe_fast
print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules)]))
"""


def test_no_extra_is_loaded():
    """Beyond what transformers' own models load by themselves, where anything."""
    peers = "\n".join(
        f"import transformers.models.{m}.modeling_{m}"
        for m in ("bert", "roberta", "xlm_roberta", "modernbert")
    )
    ours, loaded = (
        {name.partition(".")[0] for name in names}
        for names in json.loads(_run(LOADED.format(peers=peers)).splitlines()[-1])
    )
    assert not {"sentence_transformers", "datasets"} & loaded
    # Where Triton is installed, torch and transformers load it before us.
    assert not ours & set(FORBIDDEN)


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


ABSENT = """
import importlib.util, sys
sys.modules["sentence_transformers"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import moe_fast
from moe_fast.ops import backends
try:
    moe_fast.MoESentenceTransformer
except ImportError as error:
    print(error)
for op in ("route", "plan", "expert_mlp", "expert_mlp_norm", "expert_linear", "info_nce"):
    print(*(backends.why_unavailable(op, "triton", d) for d in ("cpu", "mps")))
"""


def test_what_is_not_installed_is_asked_for_by_name():
    printed = _run(ABSENT)
    assert "pip install -e '.[train]'" in printed
    assert printed.count("triton is not installed") == 12
