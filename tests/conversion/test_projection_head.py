"""A projection head behind the pooling is kept by every conversion."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import moe_fast
from tests.models.tiny import save_sentence_transformer

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

from sentence_transformers import SentenceTransformer

TEXTS = ["w1 w2 w3", "w7", "w30 w9 w9 w1 w4"]
D, HIDDEN, OUT = 32, 20, 12
KINDS = ["Transformer", "Pooling", "LayerNorm", "Dense", "Dense"]


def head_weights(bias=True):
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
        "w1.weight": (HIDDEN, D),
        "w1.bias": (HIDDEN,),
        "w2.weight": (OUT, HIDDEN),
        "w2.bias": (OUT,),
    }
    return {
        f"model.pooler.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if bias or name.startswith("layernorm") or name.endswith("weight")
    }


@pytest.fixture
def plain(tmp_path):
    return SentenceTransformer(save_sentence_transformer(tmp_path), device="cpu")


@pytest.fixture
def projected(plain):
    return moe_fast.add_projection_head(plain, checkpoint=head_weights())


def by_hand(pooled, weights):
    """In float64, entry by entry, from the definition."""
    w = {name.rpartition("pooler.")[2]: value.double() for name, value in weights.items()}
    rows = []
    for p in torch.as_tensor(pooled).double():
        p = (p - p.mean()) / torch.sqrt(((p - p.mean()) ** 2).mean() + 1e-5)
        p = p * w["layernorm.weight"] + w["layernorm.bias"]
        hidden = torch.tanh(w["w1.weight"] @ p + w.get("w1.bias", 0))
        rows.append(w["w2.weight"] @ hidden + w.get("w2.bias", 0))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition_with_its_gradients(plain, bias):
    weights = {name: w.double() for name, w in head_weights(bias).items()}
    model = moe_fast.add_projection_head(plain.double(), checkpoint=weights)
    pooled = plain.encode(TEXTS, convert_to_tensor=True).clone()
    got = model.encode(TEXTS, convert_to_tensor=True)
    assert got.shape == (3, OUT)
    assert (got - by_hand(pooled, weights)).abs().max() <= 1e-10
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    by_hand(pooled, leaves).pow(2).sum().backward()
    features = {"sentence_embedding": pooled.clone()}
    for module in list(model)[2:]:
        features = module(features)
    features["sentence_embedding"].pow(2).sum().backward()
    grads = {"layernorm": model[2].norm, "w1": model[3].linear, "w2": model[4].linear}
    for name, leaf in leaves.items():
        layer, part = name.rpartition("pooler.")[2].split(".")
        grad = getattr(grads[layer], part).grad
        assert (grad - leaf.grad).abs().max() <= 1e-9 * leaf.grad.abs().max(), name


def test_goes_through_every_conversion(projected, tmp_path):
    want = projected.encode(TEXTS)
    mixture = moe_fast.upcycle(projected, num_experts=2, routing="enforced", domains=["a", "b"])
    assert [type(m).__name__ for m in mixture] == KINDS
    assert mixture.get_embedding_dimension() == OUT
    assert np.abs(mixture.encode(TEXTS, domain="a") - want).max() <= 1e-5
    mixture.save_pretrained(str(tmp_path / "moe"), create_model_card=False)
    again = moe_fast.MoESentenceTransformer(str(tmp_path / "moe"), device="cpu")
    assert np.array_equal(again.encode(TEXTS, domain="b"), mixture.encode(TEXTS, domain="b"))
    expert = moe_fast.extract_expert(again, "b")
    assert type(expert) is SentenceTransformer and [type(m).__name__ for m in expert] == KINDS
    assert np.abs(expert.encode(TEXTS) - want).max() <= 1e-5
    joined = moe_fast.from_experts([expert, projected], domains=["a", "b"], shared="mean")
    assert np.abs(joined.encode(TEXTS, domain="a") - want).max() <= 1e-5
    grown = moe_fast.add_expert(joined, "c", from_expert="a")
    assert np.abs(grown.encode(TEXTS, domain="c") - want).max() <= 1e-5
    lora = moe_fast.upcycle(projected, num_experts=2, expert_form="lora")
    assert np.abs(lora.encode(TEXTS) - want).max() <= 1e-5


def test_a_head_of_a_folder_goes_before_the_normalisation(plain, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Normalize

    save_file(head_weights(), tmp_path / "head.safetensors")
    mixture = moe_fast.upcycle(plain, num_experts=2)
    mixture.append(Normalize())
    model = moe_fast.add_projection_head(mixture, checkpoint=tmp_path / "head.safetensors")
    assert type(model) is type(mixture)
    assert [type(m).__name__ for m in model] == [*KINDS, "Normalize"]
    assert np.abs(np.linalg.norm(model.encode(TEXTS), axis=1) - 1).max() <= 1e-6
    assert len(list(mixture)) == 3, "the input is not changed"


def test_a_new_head(plain):
    one, same, other = (moe_fast.add_projection_head(plain, 8, 4, seed=s) for s in (0, 0, 1))
    assert torch.equal(one[3].linear.weight, same[3].linear.weight)
    assert not torch.equal(one[3].linear.weight, other[3].linear.weight)
    assert one.encode(TEXTS).shape == (3, 4)
    assert moe_fast.add_projection_head(plain).get_embedding_dimension() == D


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"pooler.w1.weight": None}, {}, r"lacks pooler\.w1\.weight"),
        ({"pooler.w2.scale": torch.ones(3)}, {}, r"got pooler\.w2\.scale"),
        ({"pooler.w1.bias": torch.ones(3)}, {}, r"w1\.bias must have shape \[20\].*got \[3\]"),
        ({}, {"out_size": 5}, "out_size must be the checkpoint's, 12; got 5"),
        ({}, {"hidden_size": 0}, "hidden_size must be"),
    ],
)
def test_bad_heads(plain, change, settings, said):
    weights = {name.removeprefix("model."): w for name, w in head_weights().items()}
    weights = {n: w for n, w in {**weights, **change}.items() if w is not None}
    with pytest.raises((ValueError, TypeError), match=said):
        moe_fast.add_projection_head(plain, checkpoint=weights, **settings)


def test_what_has_no_pooling_gets_no_head(plain, bert):
    with pytest.raises(TypeError, match="model must be a SentenceTransformer; got BertModel"):
        moe_fast.add_projection_head(bert)
    with pytest.raises(ValueError, match="model must have a Pooling"):
        moe_fast.add_projection_head(SentenceTransformer(modules=[plain[0]], device="cpu"))
