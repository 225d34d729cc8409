"""The predictor in the encoder: its numbers, domain="auto" in forward, files and conversions."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

import moe_fast
from moe_fast.models.domain_predictor import DomainPredictor, predicted_domain_ids
from tests.models.tiny import CLS, build, relative_error, same_weights

DOMAINS = ["law", "medicine", "music"]
LENGTHS = (7, 3, 1, 9)


def with_predictor(name="bert", order=(2, 0, 1), seed=0, **settings):
    """A mixture whose experts differ, with a random predictor; its columns have another order."""
    moe = moe_fast.upcycle(
        build(name),
        num_experts=3,
        routing="enforced",
        domains=DOMAINS,
        cls_token_id=CLS,
        **settings,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mlp in moe.moe_mlps().values():
            mlp.down_proj += 0.2 * torch.randn(mlp.down_proj.shape, generator=generator)
    size = moe.config.vocab_size - len(moe.config.domain_token_ids)
    moe.domain_predictor = DomainPredictor(size, 3)
    moe.domain_predictor.weight.normal_(generator=generator)
    moe.domain_predictor.bias.normal_(generator=generator)
    known = [DOMAINS[i] for i in order]
    moe.config.domain_predictor = {"domains": known, "vocab_size": size, "num_texts": 9}
    return moe


def make_batch(seed=0, side="right"):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if side == "left":
        mask = mask.flip(1)
    first = mask.int().argmax(1)
    ids[torch.arange(len(LENGTHS)), first] = CLS
    return {"input_ids": ids, "attention_mask": mask.long()}


def oracle(moe, batch):
    """The most probable domain's name and the probabilities, in float64, one text at a time."""
    weight = moe.domain_predictor.weight.double().numpy()
    bias = moe.domain_predictor.bias.double().numpy()
    names, probabilities = [], []
    for ids, mask in zip(batch["input_ids"].numpy(), batch["attention_mask"].numpy(), strict=True):
        tokens = [int(t) for t, m in zip(ids, mask, strict=True) if m]
        logits = bias.copy()
        for token in tokens:
            logits = logits + weight[token] / len(tokens)
        exponentials = np.exp(logits - logits.max())
        names.append(moe.config.domain_predictor["domains"][int(logits.argmax())])
        probabilities.append(exponentials / exponentials.sum())
    return names, np.stack(probabilities)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_choices_are_the_oracles(dtype, side):
    moe, batch = with_predictor(), make_batch(side=side)
    moe.to(dtype)
    names, probabilities = oracle(moe, batch)
    ids = predicted_domain_ids(moe, **batch, cu_seqlens=None)
    assert [DOMAINS[i] for i in ids.tolist()] == names
    real = batch["attention_mask"].bool()
    starts = torch.tensor([0, *np.cumsum(LENGTHS)[:-1]])
    logits = moe.domain_predictor(batch["input_ids"][real], starts)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert relative_error(logits.double().softmax(1), torch.from_numpy(probabilities)) <= tolerance


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert"])
def test_auto_is_each_text_with_its_predicted_domain(name, packed):
    moe, batch = with_predictor(name), make_batch()
    ids = torch.tensor([DOMAINS.index(n) for n in oracle(moe, batch)[0]])
    assert len(ids.unique()) > 1, "a test in which one domain is predicted shows little"
    with torch.no_grad():
        got = moe(**batch, domain="auto", packed=packed).last_hidden_state
        want = moe(**batch, domain_ids=ids, packed=packed).last_hidden_state
    assert torch.equal(got, want)


def test_auto_for_a_batch_that_the_caller_packed():
    moe, batch = with_predictor(), make_batch()
    moe.set_attn_implementation("moe_fast")
    real = batch["attention_mask"].bool()
    ids = batch["input_ids"][real][None]
    starts = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    with torch.no_grad():
        got = moe(ids, cu_seq_lens_q=starts, domain="auto").last_hidden_state[0]
        want = moe(**batch, domain="auto").last_hidden_state[real]
    assert relative_error(got, want) <= 1e-6


def test_auto_as_the_default_domain_and_without_a_mask():
    moe, batch = with_predictor(), make_batch()
    moe.config.default_domain = "auto"
    moe.config.check()
    ids = batch["input_ids"][3:]  # of the full length
    with torch.no_grad():
        want = moe(ids, domain="auto").last_hidden_state
        assert torch.equal(moe(ids).last_hidden_state, want)
        assert not torch.equal(moe(ids, domain="law").last_hidden_state, want) or (
            oracle(moe, make_batch())[0][3] == "law"
        )


def test_a_compiled_model_predicts():
    moe, batch = with_predictor(), make_batch()
    with torch.no_grad():
        want = moe(**batch, domain="auto").last_hidden_state
        got = torch.compile(moe, backend="eager")(**batch, domain="auto").last_hidden_state
    assert relative_error(got, want) <= 1e-6


def test_a_learned_router_with_domain_tokens_takes_auto():
    moe = moe_fast.upcycle(build("bert"), num_experts=2, domains=["a", "b"], cls_token_id=CLS)
    moe.domain_predictor = DomainPredictor(60, 2)
    moe.domain_predictor.bias[1] = 1.0
    moe.config.domain_predictor = {"domains": ["a", "b"], "vocab_size": 60, "num_texts": 9}
    torch.nn.init.normal_(moe.get_input_embeddings().weight)
    batch = make_batch()
    with torch.no_grad():
        got = moe(**batch, domain="auto").last_hidden_state
        assert torch.equal(got, moe(**batch, domain="b").last_hidden_state)
        assert not torch.equal(got, moe(**batch, domain="a").last_hidden_state)


# --- files and conversions -----------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    moe = with_predictor()
    moe.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_weights(loaded, moe)
    assert loaded.config.domain_predictor == moe.config.domain_predictor
    assert "predictor" in (tmp_path / "README.md").read_text()
    with torch.no_grad():
        got, want = (m(**make_batch(), domain="auto").last_hidden_state for m in (loaded, moe))
    assert torch.equal(got, want)


def test_a_checkpoint_without_its_scores_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    with_predictor().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["domain_predictor.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of MoEBertModel: domain_predictor.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_it_is_no_parameter():
    moe = with_predictor()
    assert not [n for n, _ in moe.named_parameters() if "domain_predictor" in n]


def test_an_extracted_expert_is_a_plain_dense_model():
    dense = moe_fast.extract_expert(with_predictor(), "medicine")
    assert list(dense.state_dict()) == list(build("bert").state_dict())
    assert not hasattr(dense.config, "domain_predictor")


def test_a_domain_that_came_later_must_be_fitted():
    moe = with_predictor()
    grown = moe_fast.add_expert(moe, "sports", from_expert="law")
    with pytest.raises(ValueError, match=r"sports came after it was fitted\. Fit it again with"):
        grown(**make_batch(), domain="auto")
    back = moe_fast.remove_expert(grown, "sports")
    assert same_weights(back, moe) and back.config.domain_predictor == moe.config.domain_predictor


@pytest.mark.parametrize("gone", DOMAINS)
def test_a_domain_that_went_is_no_longer_predicted(gone):
    moe, batch = with_predictor(), make_batch()
    moe.config.domain_predictor["accuracy"] = 0.9
    smaller = moe_fast.remove_expert(moe, gone)
    assert "accuracy" not in smaller.config.domain_predictor
    names, probabilities = oracle(smaller, batch)
    column = moe.config.domain_predictor["domains"].index(gone)
    kept = np.delete(oracle(moe, batch)[1], column, axis=1)
    np.testing.assert_allclose(probabilities, kept / kept.sum(1, keepdims=True), rtol=1e-12)
    ids = predicted_domain_ids(smaller, **batch, cu_seqlens=None)
    assert [smaller.config.domains[i] for i in ids] == names


def test_a_predictor_without_any_domain_left_goes():
    moe = moe_fast.add_expert(with_predictor(), "sports")
    for name in DOMAINS:
        moe = moe_fast.remove_expert(moe, name)
    assert moe.config.domain_predictor is None and not hasattr(moe, "domain_predictor")


# --- what can be wrong ---------------------------------------------------------------------------


def test_no_predictor():
    moe = moe_fast.upcycle(
        build("bert"), num_experts=3, routing="enforced", domains=DOMAINS, cls_token_id=CLS
    )
    with pytest.raises(ValueError, match=r"model has none: fit one with model.fit_domain_predict"):
        moe(**make_batch(), domain="auto")


def test_embeddings_instead_of_ids():
    moe, batch = with_predictor(), make_batch()
    states = torch.randn(*batch["input_ids"].shape, 32)
    with pytest.raises(ValueError, match="domain='auto' needs input_ids"):
        moe(inputs_embeds=states, domain="auto")


def test_auto_and_ids():
    with pytest.raises(ValueError, match="give domain or expert_ids, not both"):
        with_predictor()(**make_batch(), domain="auto", expert_ids=torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"domains": ["a", "auto"]}, ValueError, r"not have the name 'auto', by which encode"),
        ({"domain_predictor": "x"}, TypeError, "domain_predictor must be a JSON object"),
        ({"domain_predictor": {}}, ValueError, "vocab_size must be a whole number above 0"),
        (
            {"domain_predictor": {"vocab_size": 60, "num_texts": 9, "domains": ["a", "z"]}},
            ValueError,
            r"distinct names of the model's domains \(a, b\); got \['a', 'z'\]",
        ),
        (
            {"domain_predictor": {"vocab_size": 60, "num_texts": 9, "domains": ["a", "a"]}},
            ValueError,
            "distinct names",
        ),
    ],
)
def test_bad_configurations(changes, error, message):
    from moe_fast.models import MoEBertConfig

    settings = {"num_experts": 2, "routing": "enforced", "domains": ["a", "b"], **changes}
    with pytest.raises(error, match=message):
        MoEBertConfig(**settings)
