"""The real all-mpnet-base-v2 (110 M parameters), where ``MOE_FAST_MPNET`` names its folder.

``make test-mpnet`` downloads it and runs these tests.
"""

import copy
import os

import numpy as np
import pytest
import torch

import moe_fast
from experiments.mpnet import FOLDER, mpnet_folder

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs moe-fast[train]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(FOLDER), reason=f"needs all-mpnet-base-v2: make test-mpnet, or {FOLDER}"
    ),
]

TEXTS = [
    "Mixture-of-experts models route each token to a few experts.",
    "Short.",
    "The quick brown fox jumps over the lazy dog, " * 6,
    "Eigenvalues of a symmetric matrix are real.",
]
DOMAINS = {"routing": "enforced", "domains": ["law", "medicine"]}


@pytest.fixture(scope="module")
def dense():
    return sentence_transformers.SentenceTransformer(str(mpnet_folder()), device="cpu")


@pytest.fixture(scope="module")
def enforced(dense):
    return moe_fast.upcycle(dense, num_experts=2, **DOMAINS)


def error(got, want):
    """The norm of the difference over the norm."""
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("experts_per_tok", [1, 2])
def test_upcycled_equals_dense(dense, experts_per_tok):
    """In float32 to a few times its own rounding.

    The dense model's vectors are 9e-7 from those in float64, and move by 1.2e-6 when two threads
    compute them instead of one; no sum in another order can be nearer than that.
    """
    moe = moe_fast.upcycle(dense, num_experts=2, num_experts_per_tok=experts_per_tok)
    for texts in (TEXTS, TEXTS[:1]):  # padded, and one row without padding
        got, want = moe.encode(texts), dense.encode(texts)
        assert error(got, want) <= 3e-6
        cosines = (got * want).sum(1)  # the model normalises
        assert np.abs(cosines - 1).max() <= 1e-6


@pytest.mark.parametrize("experts_per_tok", [1, 2])
def test_upcycled_equals_dense_in_float64(dense, experts_per_tok):
    exact = copy.deepcopy(dense).double()
    moe = moe_fast.upcycle(exact, num_experts=2, num_experts_per_tok=experts_per_tok)
    assert error(moe.encode(TEXTS), exact.encode(TEXTS)) <= 1e-13


def test_domains(dense, enforced):
    want = dense.encode(TEXTS)
    for domain in ("law", ["law", "medicine"] * 2):
        assert error(enforced.encode(TEXTS, domain=domain), want) <= 3e-6


def test_padding_changes_nothing(enforced):
    """MPNet's texts cannot be packed: ``encode`` pads, and packing by name is refused."""
    together = enforced.encode(TEXTS, domain="law")
    alone = np.concatenate([enforced.encode([text], domain="law") for text in TEXTS])
    assert error(together, alone) <= 3e-6
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"MPNet's texts cannot be packed .* how far apart"):
        enforced.transformers_model(torch.full((1, 6), 7), cu_seq_lens_q=starts, domain="law")


def test_extract_gives_it_back_bit_for_bit(dense, enforced):
    back, want = moe_fast.extract_expert(enforced, "medicine").state_dict(), dense.state_dict()
    assert list(back) == list(want)
    assert all(torch.equal(back[name], want[name]) for name in want)


def test_save_and_load(enforced, tmp_path):
    want = enforced.encode(TEXTS, domain="medicine")
    enforced.save_pretrained(str(tmp_path))
    ours = moe_fast.MoESentenceTransformer(str(tmp_path), device="cpu")
    stock = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(ours.encode(TEXTS, domain="medicine"), want)
    assert error(stock.encode(TEXTS, domain="medicine"), want) <= 3e-6
