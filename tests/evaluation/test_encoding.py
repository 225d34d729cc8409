from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.sparse
import torch

from moe_fast.evaluation import EncodeOptions, TfidfEncoder, embed
from moe_fast.evaluation.encoding import (
    all_cosines,
    embed_pairs,
    pairwise_cosine,
    passes_domain,
    wants_domains,
)
from tests.evaluation.fakes import TableEncoder

TEXTS = ["b", "a", "b", "c"]


def test_unit_vectors_row_by_row_and_each_text_once() -> None:
    model = TableEncoder({"a": [3.0, 4.0], "b": [0.0, 2.0], "c": [0.0, 0.0]})
    vectors = embed(model, TEXTS, "query")
    np.testing.assert_allclose(vectors, [[0, 1], [0.6, 0.8], [0, 1], [0, 0]])
    assert vectors.dtype == np.float64
    assert model.calls == [{"texts": ["b", "a", "c"]}]


def test_a_text_of_two_domains_is_two_texts() -> None:
    model = TableEncoder()
    embed(model, ["a", "a", "a"], "query", domains=["x", "y", "x"])
    assert model.calls == [{"texts": ["a", "a"], "domain": ["x", "y"]}]


@pytest.mark.parametrize(
    "convert",
    [np.asarray, torch.tensor, lambda v: torch.tensor(v).bfloat16(), scipy.sparse.csr_matrix],
)
def test_arrays_tensors_and_sparse_matrices(convert) -> None:
    class Model:
        def encode(self, texts: list[str]) -> object:
            return convert(np.array([[3.0, 4.0], [0.0, 2.0]]))

    vectors = embed(Model(), ["x", "y"], "document")
    dense = vectors.toarray() if hasattr(vectors, "toarray") else vectors
    np.testing.assert_allclose(dense, [[0.6, 0.8], [0, 1]])


def test_options_go_to_the_side_they_are_for() -> None:
    options = EncodeOptions(
        batch_size=7, query_prompt="Q: ", document_prompt_name="passage", domain="x"
    )
    model = TableEncoder()
    embed(model, ["a"], "query", options=options)
    embed(model, ["a"], "document", options=options)
    assert model.calls[0] == {"texts": ["a"], "batch_size": 7, "prompt": "Q: ", "domain": "x"}
    assert model.calls[1] == {
        "texts": ["a"], "batch_size": 7, "prompt_name": "passage", "domain": "x"
    }  # fmt: skip


def test_roles_choose_the_method() -> None:
    class Asymmetric(TableEncoder):
        def encode_query(self, texts: list[str]) -> np.ndarray:
            return np.array([[1.0, 0.0]])

        def encode_document(self, texts: list[str]) -> np.ndarray:
            return np.array([[0.0, 1.0]])

    options = EncodeOptions(roles=True)
    assert embed(Asymmetric(), ["a"], "query", options=options).tolist() == [[1, 0]]
    assert embed(Asymmetric(), ["a"], "document", options=options).tolist() == [[0, 1]]
    assert embed(Asymmetric(width=3), ["a"], "document").shape == (1, 3)
    with pytest.raises(ValueError, match="needs a model with encode_query; got TableEncoder"):
        embed(TableEncoder(), ["a"], "query", options=options)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((1, 3)), r"one vector per text, \[2, d\]; got shape \(1, 3\)"),
        (np.ones(2), r"got shape \(2,\)"),
        (np.array([[1.0, np.nan], [1.0, 1.0]]), "NaN or infinite"),
        (scipy.sparse.csr_matrix([[1.0, np.inf], [1.0, 1.0]]), "NaN or infinite"),
    ],
)
def test_vectors_that_cannot_be_used(vectors, message: str) -> None:
    class Model:
        def encode(self, texts: list[str]) -> object:
            return vectors

    with pytest.raises(ValueError, match=message):
        embed(Model(), ["x", "y"], "query")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_prompt": "x", "query_prompt_name": "y"}, "query_prompt or query_prompt_name"),
        ({"document_prompt": "x", "document_prompt_name": "y"}, "not both"),
        ({"domain": "x", "pass_domain": True}, "give domain .* or pass_domain"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_options_that_exclude_each_other(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodeOptions(**options)


def test_whether_domains_are_passed() -> None:
    class Config:
        domains = ("x",)

    class Mixture:
        class transformers_model:
            config = Config()

    mixture, other = Mixture(), TableEncoder()
    assert wants_domains(mixture) and not wants_domains(other)
    assert passes_domain(mixture, EncodeOptions(), True)
    assert not passes_domain(mixture, EncodeOptions(), False)
    assert not passes_domain(mixture, EncodeOptions(domain="x"), True)
    assert not passes_domain(mixture, EncodeOptions(pass_domain=False), True)
    assert not passes_domain(other, EncodeOptions(), True)
    assert passes_domain(other, EncodeOptions(pass_domain=True), True)
    with pytest.raises(ValueError, match="this data has none"):
        passes_domain(other, EncodeOptions(pass_domain=True), False)


def test_pairs_are_queries_and_documents_with_their_domains() -> None:
    model = TableEncoder()
    columns = {"a": ["x", "y"], "b": ["u", "v"], "domain": ["f", "g"]}
    options = EncodeOptions(pass_domain=True, query_prompt="Q: ")
    a, b, settings = embed_pairs(model, columns, options)
    assert model.calls == [
        {"texts": ["x", "y"], "domain": ["f", "g"], "prompt": "Q: "},
        {"texts": ["u", "v"], "domain": ["f", "g"]},
    ]
    assert settings["encode"]["pass_domain"] is True
    expected = [[model.cosine(p, q) for q in "uv"] for p in "xy"]
    np.testing.assert_allclose(all_cosines(a, b), expected)
    np.testing.assert_allclose(pairwise_cosine(a, b), np.diag(expected))


def test_sparse_cosines_are_the_dense_ones() -> None:
    texts = ["one two", "two three three", "four", "one four"]
    model = TfidfEncoder(texts)
    a, b = embed(model, texts[:2], "query"), embed(model, texts[2:], "document")
    np.testing.assert_allclose(all_cosines(a, b), a.toarray() @ b.toarray().T)
    np.testing.assert_allclose(pairwise_cosine(a, b), np.diag(a.toarray() @ b.toarray().T))


def test_equal_vectors_have_equal_cosines() -> None:
    vector = np.random.default_rng(0).normal(size=37)
    same = np.tile(vector / np.linalg.norm(vector), (301, 1))
    assert set(all_cosines(same, same).ravel()) | set(pairwise_cosine(same, same)) == {1.0}


# --- sentence-transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("sentence_transformers")
    from tests.models.tiny import save_sentence_transformer

    return save_sentence_transformer(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def dense(folder: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


def test_a_sentence_transformer_with_its_prompts(dense) -> None:
    found = embed(dense, ["w5", "w6"], "query", options=EncodeOptions(roles=True))
    expected = dense.encode_query(["w5", "w6"], normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    plain = dense.encode(["w5", "w6"], normalize_embeddings=True)
    np.testing.assert_allclose(embed(dense, ["w5", "w6"], "query"), plain, atol=1e-6)
    assert np.abs(plain - expected).max() > 1e-3


def test_what_a_stock_model_would_cut_is_an_error(dense) -> None:
    long = " ".join(["w1"] * 30)  # 32 tokens with [CLS] and [SEP]: as many as it takes
    embed(dense, ["w1", long], "query")
    message = r"at most max_seq_length = 32 .*text 1 has 33 \(1 of 2 texts are too long\): 'w1 w1"
    with pytest.raises(ValueError, match=message):
        embed(dense, ["w1", f"{long} w2"], "query")
    for options in (
        EncodeOptions(query_prompt="w2 "),
        EncodeOptions(query_prompt_name="query"),
        EncodeOptions(roles=True),
    ):
        with pytest.raises(ValueError, match="text 0 has 33"):
            embed(dense, [long], "query", options=options)
    cut = embed(dense, [f"{long} w2"], "query", options=EncodeOptions(truncate=True))
    np.testing.assert_allclose(cut, embed(dense, [long], "query"), atol=1e-6)


def test_a_mixture_gets_each_texts_domain_and_measures_itself(dense) -> None:
    import moe_fast

    model = moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=["x", "y"])
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    texts, domains = ["w5", "w5", "w7"], ["x", "y", "x"]
    found = embed(model, texts, "query", domains=domains, options=EncodeOptions(roles=True))
    expected = model.encode_query(texts, domain=domains, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    with pytest.raises(ValueError, match="truncate=True"):
        embed(model, [" ".join(["w1"] * 40)], "query", options=EncodeOptions(domain="x"))
    with pytest.raises(ValueError, match="'z'"):
        embed(model, ["w1"], "query", options=EncodeOptions(domain="z"))


def test_a_model_of_several_encoders_is_refused(dense) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    router = Router.for_query_document(list(copy.deepcopy(dense)), list(dense))
    both = SentenceTransformer(modules=[router], device="cpu")
    with pytest.raises(TypeError, match=r"one encoder; got a SentenceTransformer of 2: BertModel"):
        embed(both, ["w1"], "query")
