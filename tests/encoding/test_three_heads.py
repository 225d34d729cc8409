"""Encoders with three heads: BGE-M3's folders, its outputs and scores, on dense and mixture."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

import moe_fast
from moe_fast.encoding.head_outputs import HeadOutputs, head_scores
from moe_fast.encoding.loading import load_model
from moe_fast.encoding.three_heads import OUTPUTS
from tests.models.tiny import same_weights, save_sentence_transformer

TEXTS = ["w3 w4 w5 w3", "w6", "w7 w8 w9 w10 w11 w3", "zzz w8", "w3 w3"]
SPECIAL = {0, 1, 4, 5}  # PAD, UNK, CLS, SEP
DOMAINS = ["a", "b", "c"]
DIM = 12


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as BGE-M3's: XLM-R, CLS pooling, weights in ``.bin``, heads in float16 ``.pt``."""
    folder = tmp_path_factory.mktemp("published")
    path = Path(save_sentence_transformer(folder, "xlm_roberta"))
    shutil.rmtree(path / "1_Pooling")
    model = SentenceTransformer(str(folder / "encoder"), device="cpu")
    torch.save(model[0].model.state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    base = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": where, "type": base + kind}
        for i, (where, kind) in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    for where, _ in modules[1:]:
        (path / where).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    pooling["pooling_mode_mean_tokens"] = False
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    generator = torch.Generator().manual_seed(1)
    for name, rows in (("sparse_linear", 1), ("colbert_linear", DIM)):
        state = {
            "weight": torch.randn(rows, 32, generator=generator).half(),
            "bias": torch.randn(rows, generator=generator).half(),
        }
        if name == "sparse_linear":  # most tokens have a positive weight, some have none
            state = {"weight": 0.2 * state["weight"], "bias": state["bias"].fill_(2.0)}
        torch.save(state, path / f"{name}.pt")
    return path


@pytest.fixture
def model(published):
    return moe_fast.load_three_heads(str(published), device="cpu")


def oracle(model, text: str):
    """One text alone, in float64, after the published definition: (dense, sparse, vectors)."""
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model[0].model.double()(input_ids=ids).last_hidden_state[0]
        sparse, colbert = model.heads.sparse_linear.double(), model.heads.colbert_linear.double()
        weights = torch.relu(hidden @ sparse.weight[0] + sparse.bias)
        vectors = F.normalize(hidden[1:] @ colbert.weight.T + colbert.bias, dim=-1)
    largest = {}
    for i, w in zip(ids[0].tolist(), weights.tolist(), strict=True):
        if i not in SPECIAL and w > 0:
            largest[i] = max(w, largest.get(i, 0.0))
    return F.normalize(hidden[0], dim=0).numpy(), largest, vectors.numpy()


def error(got, want) -> float:
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


# --- the published folder ------------------------------------------------------------------------


def test_the_outputs_are_the_published_ones(model):
    got = model.encode(TEXTS, outputs=OUTPUTS, batch_size=2)
    assert got.sparse.shape == (5, 60) and got.dense.shape == (5, 32)
    assert got.dense.dtype == got.sparse.dtype == got.multi_vector[0].dtype == np.float32
    named = got.lexical_weights(model.tokenizer)
    for i, text in enumerate(TEXTS):
        dense, sparse, vectors = oracle(model, text)
        assert error(got.dense[i], dense) < 1e-5
        assert error(got.multi_vector[i], vectors) < 1e-5
        weights = got.lexical_weights()[i]
        assert {int(token) for token in weights} == set(sparse)
        assert all(weights[str(t)] == pytest.approx(w, rel=1e-5) for t, w in sparse.items())
        assert named[i] == {
            model.tokenizer.convert_ids_to_tokens(int(t)): w for t, w in weights.items()
        }
    assert any(named) and not {"[CLS]", "[SEP]", "[UNK]"} & {t for row in named for t in row}


def test_the_scores_are_the_published_ones(model):
    queries, documents = TEXTS[:2], TEXTS[1:]
    outputs = [model.encode(texts, outputs=OUTPUTS) for texts in (queries, documents)]
    scores = head_scores(*outputs)
    want = np.zeros((3, 2, 4))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            (d, s, m), (e, t, n) = oracle(model, query), oracle(model, document)
            shared = sum(s[token] * t[token] for token in s.keys() & t.keys())
            want[:, i, j] = d @ e, shared, (m @ n.T).max(1).mean()
    for got, expected in zip((scores.dense, scores.sparse, scores.multi_vector), want, strict=True):
        assert error(got, expected) < 1e-5
    assert error(scores.combined, want[0] + 0.3 * want[1] + want[2]) < 1e-5
    weighed = head_scores(*outputs, weights=(0, 2.0, 0))
    assert weighed.dense is None and error(weighed.combined, 2 * want[1]) < 1e-5


def test_in_and_out_bit_for_bit(published, model, tmp_path):
    model.save(str(tmp_path / "out"), bge_m3_files=True)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    given = torch.load(published / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == given.keys() and all(torch.equal(saved[n], given[n]) for n in saved)
    for name in ("sparse_linear", "colbert_linear"):
        before = torch.load(published / f"{name}.pt", weights_only=True)
        after = torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True)
        assert list(before) == list(after)
        for key, tensor in before.items():
            assert after[key].dtype == torch.float16 and torch.equal(after[key], tensor)
            ours = load_file(tmp_path / "out" / f"{name}.safetensors")[key]
            assert ours.dtype == torch.float32 and torch.equal(ours, tensor.float())
    again = moe_fast.load_three_heads(str(tmp_path / "out"), device="cpu")
    assert same_weights(again, model)
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))
    with torch.no_grad():
        again.heads.sparse_linear.bias += 1e-6  # no float16 holds it: trained heads stay exact
    again.save(str(tmp_path / "trained"), bge_m3_files=True)
    state = torch.load(tmp_path / "trained" / "sparse_linear.pt", weights_only=True)
    assert torch.equal(state["bias"], again.heads.sparse_linear.bias)


def test_an_old_pt_file_does_not_outlive_a_save(published, model, tmp_path):
    model.save(str(tmp_path / "out"), bge_m3_files=True)
    model.save(str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.pt"))


def test_without_modules_json_it_pools_the_first_token(published, model, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(published, folder)
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    bare = moe_fast.load_three_heads(str(folder), device="cpu")
    got, want = (m.encode(TEXTS[:2], outputs=OUTPUTS) for m in (bare, model))
    assert np.array_equal(got.dense, want.dense) and (got.sparse != want.sparse).nnz == 0


def test_the_length_is_the_positions_that_the_encoder_has(published, tmp_path):
    """XLM-R counts positions from behind the padding's id: 8,194 of them hold 8,192 tokens."""
    folder = tmp_path / "bare"
    shutil.copytree(published, folder)
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bare = moe_fast.load_three_heads(str(folder), device="cpu")
    padding = bare.transformers_model.config.pad_token_id
    assert bare.max_seq_length == 40 - padding - 1
    bare.encode(["w3 " * 100], outputs="sparse", truncate=True)


# --- stock classes -------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [False, True])
def test_stock_classes_open_the_parts(published, model, tmp_path, mixture):
    if mixture:
        model = moe_fast.upcycle(model, num_experts=2)
    want = model.encode(TEXTS, outputs=("dense", "multi_vector"))
    model.save(str(tmp_path / "all"))
    dense = SentenceTransformer(str(tmp_path / "all"), device="cpu")
    assert type(dense) is SentenceTransformer
    assert error(dense.encode(TEXTS), want.dense) < 1e-6
    model.multi_vector_encoder().save(str(tmp_path / "multi"))
    multi = MultiVectorEncoder(str(tmp_path / "multi"), device="cpu")
    for encode in (multi.encode, multi.encode_query, multi.encode_document):
        vectors = encode(TEXTS, prompt="")
        for got, expected in zip(vectors, want.multi_vector, strict=True):
            assert error(got.numpy(), expected) < 1e-5
    scores = multi.similarity(vectors[:2], vectors[2:])
    parts = (
        HeadOutputs(multi_vector=want.multi_vector[:2]),
        HeadOutputs(multi_vector=want.multi_vector[2:]),
    )
    assert error(scores.numpy(), head_scores(*parts, weights=(0, 0, 1)).multi_vector) < 1e-5


def test_load_model_keeps_the_heads(published):
    assert type(load_model(str(published), device="cpu")) is moe_fast.ThreeHeadEncoder
    mixture = moe_fast.upcycle(str(published), num_experts=2)
    assert type(mixture) is moe_fast.MoEThreeHeadEncoder


# --- on any encoder ------------------------------------------------------------------------------


def test_new_heads_on_a_dense_model(dense):
    model = moe_fast.add_three_heads(dense)
    got = model.encode(TEXTS, outputs=OUTPUTS)
    assert np.array_equal(model.encode(TEXTS), dense.encode(TEXTS))
    assert error(got.dense, dense.encode(TEXTS)) < 1e-6
    assert set(got.sparse.data) == {np.float32(0.1)}, "a new sparse head counts shared tokens"
    tokens = dense.encode(TEXTS, output_value="token_embeddings")
    for vectors, states in zip(got.multi_vector, tokens, strict=True):
        assert error(vectors, F.normalize(states[1:], dim=-1).numpy()) < 1e-5, "the identity"
    narrow = moe_fast.add_three_heads(dense, multi_vector_dim=8)
    rows = narrow.heads.colbert_linear.weight
    assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    with pytest.raises(TypeError, match="without heads; got ThreeHeadEncoder"):
        moe_fast.add_three_heads(model)


@pytest.mark.parametrize("routing", ["enforced", "token_topk"])
def test_on_a_mixture(dense, tmp_path, routing):
    mixture = moe_fast.upcycle(dense, num_experts=3, routing=routing, domains=DOMAINS)
    for mlp in mixture.transformers_model.moe_mlps().values():
        mlp.down_proj.data += 0.2 * torch.randn(mlp.down_proj.shape)
    model = moe_fast.add_three_heads(mixture, multi_vector_dim=DIM)
    assert type(model) is moe_fast.MoEThreeHeadEncoder
    per_text = ["c", "a", "c", "b", "a"]
    got = model.encode(TEXTS, outputs=OUTPUTS, domain=per_text, batch_size=3)
    assert error(got.dense, mixture.encode(TEXTS, domain=per_text)) < 1e-5
    padded = model.encode(TEXTS, outputs=OUTPUTS, domain=per_text, packed=False)
    for i, domain in enumerate(per_text):
        alone = model.encode(TEXTS[i], outputs=OUTPUTS, domain=domain)
        for one in (got, padded):
            assert error(one.dense[i], alone.dense[0]) < 1e-5
            assert error(one.multi_vector[i], alone.multi_vector[0]) < 1e-5
            assert error(one.sparse[i].toarray(), alone.sparse.toarray()) < 1e-5
    model.save_pretrained(str(tmp_path))
    again = moe_fast.load_three_heads(str(tmp_path), device="cpu")
    assert type(again) is moe_fast.MoEThreeHeadEncoder and same_weights(again, model)
    with pytest.raises(ValueError, match="zz"):
        model.encode(TEXTS, outputs=OUTPUTS, domain="zz")


def test_upcycle_and_extract_keep_the_heads(model):
    mixture = moe_fast.upcycle(model, num_experts=2, routing="enforced", domains=["a", "b"])
    want = model.encode(TEXTS, outputs=OUTPUTS)
    got = mixture.encode(TEXTS, outputs=OUTPUTS, domain="b")
    assert error(got.dense, want.dense) < 1e-5
    assert error(got.sparse.toarray()[:, :60], want.sparse.toarray()) < 1e-5
    alone = moe_fast.extract_expert(mixture, "b")
    assert type(alone) is moe_fast.ThreeHeadEncoder and same_weights(alone, model)


# --- what a user may do wrong --------------------------------------------------------------------


def test_any_number_of_texts(model):
    none = model.encode([], outputs=OUTPUTS)
    assert none.dense.shape == (0, 32) and none.sparse.shape == (0, 60) and none.multi_vector == []
    assert head_scores(none, none).combined.shape == (0, 0)
    one = model.encode("w3", outputs="multi_vector")
    assert one.dense is None and len(one.multi_vector) == 1
    empty = model.encode("", outputs=OUTPUTS)  # the end of the text is its only vector
    assert empty.sparse.nnz == 0 and empty.multi_vector[0].shape == (1, DIM)
    assert np.isfinite(head_scores(empty, one_of(model, "w3")).combined).all()


def one_of(model, text):
    return model.encode(text, outputs=OUTPUTS)


def test_queries_have_their_prompt(dense):
    model = moe_fast.add_three_heads(dense)
    got = model.encode_query(["w3"], outputs="sparse").lexical_weights(model.tokenizer)
    assert set(got[0]) == {"w1", "w3"}, "the prompt is w1"


def test_long_texts_are_not_cut_silently(model, caplog):
    long = ["w3", "w4 " * 60]
    with pytest.raises(ValueError, match="at most max_seq_length = 32 tokens"):
        model.encode(long, outputs=OUTPUTS)
    assert len(model.encode(long, outputs=OUTPUTS, truncate=True).multi_vector[1]) == 31
    assert "1 of 2 texts are longer" in caplog.text


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ValueError, {"outputs": ["lexical"]}, "outputs must be one of 'dense', 'sparse'"),
        (ValueError, {"outputs": []}, "outputs must name at least one"),
        (ValueError, {"outputs": OUTPUTS, "batch_size": 0}, "batch_size must be at least 1"),
        (TypeError, {"outputs": OUTPUTS, "domain": "a"}, "a dense model has no domains"),
        (TypeError, {"outputs": OUTPUTS, "inputs": [3]}, "text 0 is a int"),
        (TypeError, {"outputs": OUTPUTS, "convert_to_tensor": True}, "got convert_to_tensor=True"),
    ],
)
def test_bad_arguments(model, kind, arguments, message):
    with pytest.raises(kind, match=message):
        model.encode(**({"inputs": TEXTS} | arguments))


def test_scores_need_their_outputs(model):
    got = model.encode(TEXTS, outputs="dense")
    with pytest.raises(ValueError, match="the sparse output is needed, and was not asked for"):
        head_scores(got, got)
    with pytest.raises(ValueError, match="weights must be three finite numbers"):
        head_scores(got, got, weights=(1, 0))
    assert head_scores(got, got, weights=(1, 0, 0)).combined.shape == (5, 5)


def test_a_text_with_nan_is_named(model):
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight[7] = torch.nan  # the word w1
    with pytest.raises(ValueError, match="NaN or infinite numbers for text 2"):
        model.encode(["w3", "w4", "w5 w1"], outputs="sparse")


class Evil:
    def __reduce__(self):
        return (print, ("foreign code ran",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sparse_linear", {"weight": torch.ones(1, 32)}, "weight and bias of one linear layer"),
        ("sparse_linear", [torch.ones(1, 32)], "got a list"),
        ("sparse_linear", (2, 32, 2), r"shapes \[1, 32\] and \[1\]"),
        ("colbert_linear", (4, 31, 4), r"shapes \[D', 32\].*got .*\[4, 31\]"),
        ("colbert_linear", (4, 32, 3), r"shapes \[D', 32\]"),
        ("colbert_linear", "nan", "weight must be finite"),
        ("colbert_linear", "integers", "weight must be a tensor of floats"),
        ("colbert_linear", b"not a file of torch", "cannot be read as the weights"),
        ("colbert_linear", Evil(), "cannot be read as the weights"),
    ],
)
def test_bad_files_are_named(published, tmp_path, capfd, name, content, message):
    folder = tmp_path / "bad"
    shutil.copytree(published, folder)
    file = folder / f"{name}.pt"
    if isinstance(content, tuple):
        rows, columns, biases = content
        content = {"weight": torch.ones(rows, columns), "bias": torch.ones(biases)}
    elif content == "nan":
        content = {"weight": torch.full((4, 32), torch.nan), "bias": torch.ones(4)}
    elif content == "integers":
        content = {"weight": torch.ones(4, 32, dtype=torch.int64), "bias": torch.ones(4)}
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, Evil):
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message) as raised:
        moe_fast.load_three_heads(str(folder), device="cpu")
    assert f"{name}.pt" in str(raised.value) and "foreign code ran" not in capfd.readouterr().out


def test_missing_files(folder, published, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no heads: it needs sparse_linear"):
        moe_fast.load_three_heads(folder)
    with pytest.raises(FileNotFoundError, match="neither sparse_linear.safetensors nor"):
        moe_fast.ThreeHeadEncoder(folder, device="cpu")
    with pytest.raises(TypeError, match="needs ThreeHeads as its last module"):
        moe_fast.ThreeHeadEncoder(modules=list(SentenceTransformer(folder, device="cpu")))
