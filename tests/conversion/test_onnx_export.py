"""export_onnx: the file gives the model's vectors, whatever the encoder and the routing."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("onnx", reason="needs the extra moe-fast[onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra moe-fast[onnx]")

import onnx
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

import moe_fast
from moe_fast import OnnxEncoder
from moe_fast.conversion import onnx_export
from tests.models.tiny import ENCODERS, build, save_sentence_transformer

DOMAINS = ["law", "medicine", "news"]
TEXTS = ["w1 w2 w3", "w50", "", "w7 " * 25, "w9 w8", "w20 w21 w22 w23 w24", "w3 " * 30]
ROUTINGS = {
    "enforced": {"routing": "enforced", "domains": DOMAINS},
    "dense": {"routing": "dense"},
    "token_topk": {"routing": "token_topk"},
    "token_topk, 2": {"routing": "token_topk", "num_experts_per_tok": 2},
    "token_topk, domains": {"routing": "token_topk", "domains": DOMAINS},
    "sentence_topk": {"routing": "sentence_topk", "num_experts_per_tok": 2},
    "sentence_switch": {"routing": "sentence_switch", "weight_mode": "probability"},
}


@pytest.fixture(scope="module")
def dense_folders(tmp_path_factory):
    made = {}

    def folder(name="bert"):
        if name not in made:
            made[name] = save_sentence_transformer(tmp_path_factory.mktemp(name), name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def mixture_of(dense_folders):
    def make(name="bert", **options):
        mixture = moe_fast.upcycle(dense_folders(name), num_experts=3, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for mlp in mixture.transformers_model.moe_mlps().values():
                mlp.down_proj += 0.2 * torch.randn(mlp.down_proj.shape)
        return mixture

    return make


def assert_same(exported, model, **options):
    found = exported.encode(TEXTS, batch_size=3, **options)
    expected = model.encode(TEXTS, **options)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= 1e-4


def operators(path):
    graph = onnx.load(path).graph
    return {(node.domain, node.op_type) for node in graph.node}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(routing, mixture_of, tmp_path):
    model = mixture_of(**ROUTINGS[routing])
    assert moe_fast.export_onnx(model, tmp_path / "out") == tmp_path / "out"
    exported = OnnxEncoder(tmp_path / "out")
    if "domains" in ROUTINGS[routing]:
        assert_same(
            exported, model, domain=["law", "news", "medicine", "law", "law", "news", "law"]
        )
        assert_same(exported, model, domain="news")
    if routing != "enforced":
        assert_same(exported, model)
    assert {domain for domain, _ in operators(tmp_path / "out" / "model.onnx")} == {""}
    names = {"model.onnx", "onnx_encoder.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} >= names


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["enforced", "token_topk, 2"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder(name, routing, mixture_of, tmp_path):
    model = mixture_of(name, **ROUTINGS[routing])
    moe_fast.export_onnx(model, tmp_path / "out")
    options = {"domain": "medicine"} if routing == "enforced" else {}
    assert_same(OnnxEncoder(tmp_path / "out"), model, **options)


@pytest.mark.parametrize("target", ["intermediate", "output"])
def test_other_targets_and_few_layers(target, mixture_of, tmp_path):
    model = mixture_of(routing="token_topk", target=target, layers=[1])
    moe_fast.export_onnx(model, tmp_path / "out")
    assert_same(OnnxEncoder(tmp_path / "out"), model)


def test_one_domain_is_a_dense_model(mixture_of, tmp_path):
    model = mixture_of(**ROUTINGS["enforced"])
    moe_fast.export_onnx(model, tmp_path / "news", domain="news")
    exported = OnnxEncoder(tmp_path / "news")
    expected = model.encode(TEXTS, domain="news")
    np.testing.assert_allclose(exported.encode(TEXTS), expected, atol=1e-5)
    assert "NonZero" not in {name for _, name in operators(tmp_path / "news" / "model.onnx")}
    with pytest.raises(ValueError, match="the model has no domains"):
        exported.encode(TEXTS, domain="news")


def test_the_modules_behind_the_encoder_are_in_the_graph(mixture_of, tmp_path):
    model = mixture_of(routing="token_topk")
    torch.manual_seed(0)
    model.append(Dense(32, 12))
    model.append(Normalize())
    moe_fast.export_onnx(model, tmp_path / "out")
    exported = OnnxEncoder(tmp_path / "out")
    assert exported.get_embedding_dimension() == 12
    assert_same(exported, model)


def test_a_dense_model_and_paths(dense_folders, tmp_path):
    moe_fast.export_onnx(dense_folders(), tmp_path / "out")
    assert_same(OnnxEncoder(tmp_path / "out"), SentenceTransformer(dense_folders(), device="cpu"))


def test_the_predicted_and_the_default_domain(mixture_of, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra moe-fast[eval]")
    model = mixture_of(**ROUTINGS["enforced"])
    texts = [f"w{i} w{i + 1}" for i in range(51)]
    model.fit_domain_predictor(texts, [DOMAINS[i // 17] for i in range(51)])
    model.transformers_model.config.default_domain = "medicine"
    moe_fast.export_onnx(model, tmp_path / "out")
    exported = OnnxEncoder(tmp_path / "out")
    assert len(set(model.predict_domain(TEXTS).domains)) > 1
    assert_same(exported, model, domain="auto")
    assert_same(exported, model)
    np.testing.assert_array_equal(exported.encode(TEXTS), exported.encode(TEXTS, domain="medicine"))


def test_half_precision_is_widened(mixture_of, tmp_path):
    model = mixture_of(routing="token_topk").bfloat16()
    moe_fast.export_onnx(model, tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # is not changed
    assert_same(OnnxEncoder(tmp_path / "out"), model.float())


def test_the_model_is_not_changed(mixture_of, tmp_path):
    model = mixture_of(routing="token_topk")
    config = model.transformers_model.config
    before, expected = config.to_dict(), model.encode(TEXTS)
    moe_fast.export_onnx(model, tmp_path / "out")
    assert config.to_dict() == before and config._attn_implementation == "sdpa"
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


# --- refusals, before any work -------------------------------------------------------------------


@pytest.fixture
def never(monkeypatch):
    """Fails a test that begins to write a graph."""

    def write(*arguments):
        raise AssertionError("work began")

    monkeypatch.setattr(onnx_export, "_write_graph", write)


def refused(model, folder, error, message, **options):
    with pytest.raises(error, match=re.escape(message)):
        moe_fast.export_onnx(model, folder / "out", **options)
    assert not (folder / "out").exists()


def test_what_cannot_be_exported_is_refused(never, mixture_of, dense_folders, tmp_path):
    enforced, learned = mixture_of(**ROUTINGS["enforced"]), mixture_of(routing="token_topk")
    dense = SentenceTransformer(dense_folders(), device="cpu")
    refused(build("bert"), tmp_path, TypeError, "must be a SentenceTransformer")
    refused(moe_fast.quantize(learned), tmp_path, ValueError, "cannot be exported to ONNX")
    refused(enforced, tmp_path, ValueError, "'law', 'medicine', 'news'", domain="x")
    refused(learned, tmp_path, ValueError, "domain must be None with routing", domain="law")
    refused(dense, tmp_path, ValueError, "domain must be None for a dense model", domain="law")
    learned[1].include_prompt = False
    refused(learned, tmp_path, ValueError, "leaves out the prompt")
    three = moe_fast.add_three_heads(dense)
    refused(three, tmp_path, ValueError, "with one vector per text; got ThreeHeadEncoder")
    enforced.transformers_model.config.route_by_token_type = True
    refused(enforced, tmp_path, ValueError, "route_by_token_type")


def test_an_existing_output_is_kept(never, mixture_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"):
        moe_fast.export_onnx(mixture_of(routing="dense"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_file_that_computes_something_else_is_not_put_in_place(mixture_of, tmp_path, monkeypatch):
    """The exporter is given another model: an expert that was changed behind its back."""
    model = mixture_of(**ROUTINGS["enforced"])
    plain_copy = onnx_export._plain_copy

    def wrong(given):
        plain = plain_copy(given)
        noise = 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(0))
        mlp = next(iter(plain.transformers_model.encoder.layer)).mlp
        mlp.down_proj[1].bias = torch.nn.Parameter(mlp.down_proj[1].bias + noise)
        return plain

    monkeypatch.setattr(onnx_export, "_plain_copy", wrong)
    refused(model, tmp_path, RuntimeError, "of domain 'medicine' differs by")
    assert list(tmp_path.iterdir()) == []
