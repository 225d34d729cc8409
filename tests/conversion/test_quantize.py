"""quantize: every encoder, saved, loaded, packed, with all kinds of routing; what it refuses."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from transformers import AutoModel

import moe_fast
from moe_fast.layers.int8 import Int8Matrix, Int8MoEMLP
from tests.models.tiny import CLS, ENCODERS, build, build_head, same_weights

# Random encoders of width 32 in which every value matters: 8 bits keep two digits.
LOSS = 0.06
IDS = torch.randint(6, 60, (4, 12), generator=torch.Generator().manual_seed(0))
IDS[:, 0] = CLS
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
MASK[3, 9:] = 0


def mixture(name: str = "bert", **settings):
    torch.manual_seed(0)
    settings = {"num_experts": 3, "cls_token_id": CLS} | settings
    moe = moe_fast.upcycle(build(name), **settings)
    with torch.no_grad():
        for _, parameter in moe.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return moe.eval()


@torch.no_grad()
def output(model, **inputs):
    """The hidden states of real tokens."""
    y = model(input_ids=IDS, attention_mask=MASK, **inputs).last_hidden_state
    return y[MASK.bool()]


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_in_int8_computes_nearly_the_same(name, tmp_path):
    moe = mixture(name, layers=[0, 2], routing="enforced")  # a learned router may choose another
    before = copy.deepcopy(moe.state_dict())
    small = moe_fast.quantize(moe)
    assert type(small) is type(moe)
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items())
    assert not any(isinstance(m, torch.nn.Linear) for m in small.encoder_layers.modules())
    ids = {"expert_ids": torch.tensor([0, 1, 2, 1])}
    got = output(small, **ids)
    assert 0 < difference(got, output(moe, **ids)) < LOSS
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_weights(small, loaded)
    for other in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(output(other, **ids), got)


@pytest.mark.parametrize("name", ["bert", "modernbert", "nomic_bert", "xlm_roberta_xl"])
def test_packed_gives_what_padded_gives(name):
    small = moe_fast.quantize(mixture(name))
    assert difference(output(small, packed=True), output(small)) < 0.02  # attention in bfloat16


@pytest.mark.parametrize(
    "settings",
    [
        {"routing": "token_topk", "num_experts_per_tok": 2},
        {"routing": "sentence_topk"},
        {"routing": "sentence_switch"},
        {"routing": "dense"},
        {"target": "output"},
        {"target": "intermediate", "num_experts_per_tok": 2},
    ],
)
def test_every_routing_and_target(settings):
    moe = mixture(**settings)
    small = moe_fast.quantize(moe)
    assert difference(output(small), output(moe)) < LOSS


def test_enforced_routing_sends_a_text_to_its_expert():
    moe = mixture(routing="enforced", domains=["a", "b", "c"])
    small = moe_fast.quantize(moe)
    for domain in "abc":
        assert difference(output(small, domain=domain), output(moe, domain=domain)) < LOSS
    assert difference(output(small, domain="a"), output(small, domain="b")) > LOSS


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_a_head_stays_as_it_is(head, tmp_path):
    moe = moe_fast.upcycle(build_head("bert", head), num_experts=3)
    small = moe_fast.quantize(moe)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    with torch.no_grad():
        got, want = (m(input_ids=IDS, attention_mask=MASK).logits for m in (loaded, moe))
    assert difference(got, want) < LOSS
    for name, value in moe.state_dict().items():
        if not name.startswith("bert."):
            assert torch.equal(loaded.state_dict()[name], value)


def test_a_bfloat16_mixture_becomes_float32_around_its_integers():
    small = moe_fast.quantize(mixture().bfloat16())
    assert small.dtype == torch.float32
    assert {b.dtype for m in small.modules() if isinstance(m, Int8Matrix) for b in m.buffers()} == {
        torch.int8,
        torch.int32,
        torch.float32,
    }


def test_the_integers_are_counted_as_parameters_and_the_file_is_smaller(tmp_path):
    moe = mixture(num_experts_per_tok=2)
    small = moe_fast.quantize(moe)
    for only_active in (False, True):
        asked = {"only_active": only_active}
        assert small.num_parameters(**asked) == moe.num_parameters(**asked)
    assert small.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_is_refused_before_anything_changes(dtype):
    small = moe_fast.quantize(mixture())
    before = {name: value.clone() for name, value in small.state_dict().items()}
    for cast in (lambda: small.to(dtype), lambda: torch.nn.Sequential(small).to(dtype)):
        with pytest.raises(ValueError, match=f"an int8 mixture cannot be cast.*got {dtype}"):
            cast()
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert small.to("cpu", torch.float32) is small.float()


def test_scales_stay_float32_when_a_layer_is_cast():
    layer = moe_fast.quantize(mixture()).encoder_layers[0]
    scale = layer.mlp.up_proj.scale.clone()
    layer.bfloat16()
    assert torch.equal(layer.mlp.up_proj.scale, scale)


def test_loading_in_another_dtype_is_refused(tmp_path):
    moe_fast.quantize(mixture()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be float32"):
        AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)


def test_a_loaded_model_asks_for_no_gradients(tmp_path):
    moe_fast.quantize(mixture()).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded(input_ids=IDS, attention_mask=MASK)  # outside of no_grad, too


def test_what_a_quantised_mixture_cannot_be(tmp_path):
    small = moe_fast.quantize(mixture())
    for call in (
        lambda: moe_fast.quantize(small),
        lambda: moe_fast.extract_expert(small, 0),
        lambda: moe_fast.add_expert(small),
        lambda: moe_fast.remove_expert(small, 0),
        lambda: moe_fast.conversion.set_trainable(small, "experts"),
    ):
        with pytest.raises(ValueError, match="an int8 mixture cannot be"):
            call()
    with pytest.raises(TypeError, match="model must be dense"):
        moe_fast.upcycle(small, num_experts=2)
    with pytest.raises(ValueError, match="portable must be False"):
        small.save_pretrained(tmp_path, portable=True)
    small.requires_grad_(True)
    with pytest.raises(ValueError, match="int8_linear has no gradient"):
        small(input_ids=IDS, attention_mask=MASK)


def test_wrong_arguments_are_named():
    moe = mixture()
    with pytest.raises(ValueError, match="'float8'.*no CPU multiplies"):
        moe_fast.quantize(moe, "float8")
    with pytest.raises(ValueError, match="method must be one of 'int8'; got 'int4'"):
        moe_fast.quantize(moe, "int4")
    with pytest.raises(TypeError, match="must be a mixture of experts; got BertModel"):
        moe_fast.quantize(build("bert"))
    with pytest.raises(ValueError, match="texts must be None unless"):
        moe_fast.quantize(moe, texts=["w1"])
    with pytest.raises(TypeError, match="quantization must be None, or a dict"):
        type(moe.config)(quantization={"bits": 8})
    with pytest.raises(ValueError, match=r"quantization\['method'\] must be one of 'int8'"):
        type(moe.config)(quantization={"method": "int4", "activations": "dynamic"})


def test_a_damaged_file_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    moe_fast.quantize(mixture()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(n for n in weights if n.endswith("up_proj.values"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of MoEBertModel: .*up_proj.values"):
        AutoModel.from_pretrained(tmp_path)


# --- of sentence-transformers --------------------------------------------------------------------


TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(6, 40)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    from tests.models.tiny import save_sentence_transformer

    dense = save_sentence_transformer(tmp_path_factory.mktemp("dense"))
    return moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=["a", "b"])


def cosines(a, b):
    return torch.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("static", [False, True])
def test_a_sentence_transformer_is_saved_and_loaded(pipeline, static, tmp_path):
    from sentence_transformers import SentenceTransformer

    options = {"texts": TEXTS, "domain": "a"} if static else {}
    small = moe_fast.quantize(pipeline, **options)
    assert isinstance(small, moe_fast.MoESentenceTransformer)
    got = small.encode(TEXTS, domain="a")
    assert cosines(got, pipeline.encode(TEXTS, domain="a")).min() > 0.998
    small.save_pretrained(str(tmp_path))
    ours = moe_fast.MoESentenceTransformer(str(tmp_path))
    assert (ours.encode(TEXTS, domain="a") == got).all()
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert cosines(stock.encode(TEXTS, domain="a"), got).min() > 0.9999
    found = [m.input_range for m in ours.modules() if isinstance(m, Int8Matrix)]
    assert all((ends is not None) == static for ends in found)
    if static:
        assert all(ends[0] <= 0 < ends[1] for ends in found)
        assert any(ends[1] != 1 for ends in found)


def test_static_ranges_of_hidden_values_are_those_of_the_texts(pipeline):
    small = moe_fast.quantize(pipeline, texts=TEXTS, domain="a")
    mlps = [m for m in small.modules() if isinstance(m, Int8MoEMLP)]
    for mlp in mlps:
        low, high = mlp.down_proj.input_range.tolist()
        assert -0.2 < low < 0 < high  # GELU's least value is -0.17


def test_worker_processes_encode_with_a_copy(pipeline):
    small = moe_fast.quantize(pipeline)
    pool = small.start_multi_process_pool(["cpu"])
    try:
        got = small.encode(TEXTS, pool=pool, domain="a")
    finally:
        small.stop_multi_process_pool(pool)
    assert cosines(got, small.encode(TEXTS, domain="a")).min() > 0.9999


def test_texts_must_be_texts(pipeline):
    with pytest.raises(TypeError, match="texts must be a sequence of texts"):
        moe_fast.quantize(pipeline, texts="one")
    with pytest.raises(ValueError, match="texts must hold at least one"):
        moe_fast.quantize(pipeline, texts=[])
    with pytest.raises(ValueError, match="domain must be None without texts"):
        moe_fast.quantize(pipeline, domain="a")


def test_training_is_refused(pipeline):
    pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")
    from moe_fast.training.trainable import check_trainable

    with pytest.raises(ValueError, match="an int8 mixture cannot be trained"):
        check_trainable(moe_fast.quantize(pipeline))


def test_the_file_of_minilm_with_five_experts_is_smaller_than_the_dense_one(tmp_path):
    """Five experts of 384 x 1536 in six layers, 8 bits each, beside embeddings of 30,522 tokens."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    dense = BertModel(BertConfig(num_hidden_layers=6, **sizes))
    dense.save_pretrained(tmp_path / "dense")
    small = moe_fast.quantize(moe_fast.upcycle(dense, num_experts=5))
    small.save_pretrained(tmp_path / "int8")
    bytes_of = [os.path.getsize(tmp_path / n / "model.safetensors") for n in ("dense", "int8")]
    assert bytes_of[1] <= bytes_of[0]
