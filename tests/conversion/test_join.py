"""from_experts: N dense models become one mixture, and come out of it again."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_fast
from moe_fast.models.registry import architecture_of
from tests.models.tiny import CLS, NAMES, build, relative_error, same_weights

DOMAINS = ["a", "b", "c"]
ENFORCED = {"domains": DOMAINS, "cls_token_id": CLS}


def dense_names(architecture):
    """The names of an MLP's weights in a dense layer."""
    return {name for names in architecture.mlp_names.values() for name in names}


def variant(model, seed, only_mlps=False):
    """A copy with other weights: all of them, or those of the MLPs alone."""
    model = copy.deepcopy(model)
    architecture = architecture_of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = architecture.split(name)
            in_mlp = place is not None and place[1] in dense_names(architecture)
            if in_mlp or not only_mlps:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def variants(model, count=3, **options):
    return [variant(model, seed, **options) for seed in range(count)]


def mlps(model, layers=None):
    """The MLP weights of the given layers, by name."""
    architecture = architecture_of(model)
    places = {name: architecture.split(name) for name in model.state_dict()}
    return {
        name: model.state_dict()[name]
        for name, place in places.items()
        if place
        and place[1] in dense_names(architecture)
        and (layers is None or place[0] in layers)
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def without(model, names):
    return {name: value for name, value in model.state_dict().items() if name not in names}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(NAMES),
    count=st.integers(1, 4),
    shared=st.sampled_from(["first", "mean"]),
    layers=st.sampled_from(["all", "single", "alternate", [0, 2]]),
    routing=st.sampled_from(["enforced", "token_topk", "sentence_switch"]),
)
def test_extract_gives_each_models_mlps_back(name, count, shared, layers, routing):
    models = variants(build(name), count)
    moe = moe_fast.from_experts(models, shared=shared, layers=layers, routing=routing)
    assert moe.config.num_experts == count
    assert set(moe.moe_mlps()) == set(moe.config.moe_layers)
    means = {
        key: torch.stack([m.state_dict()[key].double() for m in models]).mean(0).float()
        for key in models[0].state_dict()
    }
    for expert, model in enumerate(models):
        back = moe_fast.extract_expert(moe, expert)
        own = mlps(model, moe.config.moe_layers)
        assert equal(mlps(back, moe.config.moe_layers), own)
        want = means if shared == "mean" else models[0].state_dict()
        for key, value in without(back, own).items():
            assert torch.allclose(value, want[key], rtol=0, atol=1e-7), key
            assert shared == "mean" or torch.equal(value, want[key]), key


@pytest.mark.parametrize(("target", "stays"), [("intermediate", "down"), ("output", "up")])
def test_the_projection_that_is_not_replicated_follows_shared(dense, target, stays):
    models = variants(dense)
    moe = moe_fast.from_experts(models, target=target)
    back = moe_fast.extract_expert(moe, 2)
    names = {"up": ("intermediate", "Wi"), "down": ("output", "Wo")}[stays]
    for name, value in mlps(back).items():
        source = models[0] if any(part in name for part in names) else models[2]
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("shared", ["first", "mean"])
def test_equal_models_give_the_dense_output(dense, batch, shared):
    models = [copy.deepcopy(dense) for _ in range(3)]
    moe = moe_fast.from_experts(models, shared=shared, **ENFORCED)
    for domain in DOMAINS:
        assert torch.equal(
            moe(**batch, domain=domain).last_hidden_state[batch["attention_mask"].bool()],
            moe_fast.upcycle(dense, num_experts=3, routing="enforced", **ENFORCED)(
                **batch, domain=domain
            ).last_hidden_state[batch["attention_mask"].bool()],
        )
        assert same_weights(moe_fast.extract_expert(moe, domain), dense)


@pytest.mark.parametrize("shared", ["first", "mean"])
def test_models_that_differ_in_their_mlps_alone_come_back_bit_for_bit(dense, batch, shared):
    models = variants(dense, only_mlps=True)
    moe = moe_fast.from_experts(models, shared=shared, **ENFORCED)
    real = batch["attention_mask"].bool()
    for domain, model in zip(DOMAINS, models, strict=True):
        assert same_weights(moe_fast.extract_expert(moe, domain), model)
        got = moe(**batch, domain=domain).last_hidden_state[real]
        assert relative_error(got, model(**batch).last_hidden_state[real]) <= 1e-6


def test_a_domains_token_starts_as_its_own_models_cls(bert):
    models = variants(bert)
    moe = moe_fast.from_experts(models, shared="mean", **ENFORCED)
    table = moe.get_input_embeddings().weight
    for token, model in zip(moe.config.domain_token_ids, models, strict=True):
        assert torch.equal(table[token], model.get_input_embeddings().weight[CLS])


def test_with_a_learned_router_it_starts_as_the_shared_cls(bert):
    models = variants(bert, 2)
    moe = moe_fast.from_experts(models, routing="token_topk", domains=DOMAINS, cls_token_id=CLS)
    table = moe.get_input_embeddings().weight
    for token in moe.config.domain_token_ids:
        assert torch.equal(table[token], models[0].get_input_embeddings().weight[CLS])
    seeded = moe_fast.upcycle(bert, num_experts=2).moe_mlps()[1].router.weight
    assert torch.equal(moe.moe_mlps()[1].router.weight, seeded), "upcycle's router, same seed"


def test_upcycles_other_arguments(bert):
    moe = moe_fast.from_experts(variants(bert), trainable="experts", **ENFORCED)
    trained = {name for name, p in moe.named_parameters() if p.requires_grad}
    assert trained and all(".mlp." in name for name in trained)


def test_the_inputs_are_untouched(bert):
    models = variants(bert)
    before = [copy.deepcopy(model) for model in models]
    with torch.no_grad():
        for parameter in moe_fast.from_experts(models, shared="mean", **ENFORCED).parameters():
            parameter.add_(1)
    assert all(same_weights(a, b) for a, b in zip(models, before, strict=True))


def test_from_folders(bert, tmp_path):
    models = variants(bert, 2)
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    moe = moe_fast.from_experts([tmp_path / "0", str(tmp_path / "1")])
    assert same_weights(moe, moe_fast.from_experts(models))


def test_dtype_is_kept(bert):
    moe = moe_fast.from_experts([m.bfloat16() for m in variants(bert)], shared="mean")
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 64}, "model 1 differs from model 0 in hidden_size: 64 instead of 32"),
            ({"num_hidden_layers": 2}, "num_hidden_layers: 2 instead of 3"),
            ({"vocab_size": 61}, "vocab_size: 61 instead of 60"),
            ({"hidden_act": "relu"}, "hidden_act: 'relu' instead of 'gelu'"),
            ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ],
    )
    def test_models_that_differ_in_more_than_weights(self, bert, change, message):
        with pytest.raises(ValueError, match=message):
            moe_fast.from_experts([bert, build("bert", **change)])

    def test_other_architectures_dtypes_and_poolers(self, bert):
        with pytest.raises(ValueError, match="class: RobertaModel instead of BertModel"):
            moe_fast.from_experts([bert, build("roberta")])
        with pytest.raises(ValueError, match=r"dtype: torch.float64 instead of torch.float32"):
            moe_fast.from_experts([bert, build("bert").double()])
        with pytest.raises(ValueError, match=r"pooler.dense.bias: missing"):
            moe_fast.from_experts([bert, type(bert)(bert.config, add_pooling_layer=False)])

    def test_dropout_may_differ(self, bert):
        moe = moe_fast.from_experts([bert, build("bert", hidden_dropout_prob=0.3)])
        assert moe.config.hidden_dropout_prob == 0.0

    def test_a_mixture(self, bert):
        moe = moe_fast.upcycle(bert, num_experts=2)
        for models, place in (([bert, moe], 1), ([moe, moe], 0)):
            with pytest.raises(TypeError, match=f"model {place} is a MoEBertModel, a mixture"):
                moe_fast.from_experts(models)

    def test_arguments(self, bert):
        for wrong in ([], "a-path", bert):
            with pytest.raises(TypeError, match="models must be a sequence"):
                moe_fast.from_experts(wrong)
        with pytest.raises(TypeError, match=r"num_experts \(the number of experts is that of the"):
            moe_fast.from_experts([bert], num_experts=2)
        with pytest.raises(TypeError, match="got tragets"):
            moe_fast.from_experts([bert], tragets="mlp")
        with pytest.raises(ValueError, match="shared must be one of 'first', 'mean'"):
            moe_fast.from_experts([bert], shared="last")
        with pytest.raises(ValueError, match="one domain per expert"):
            moe_fast.from_experts(variants(bert, 2), **ENFORCED)

    def test_arguments_are_checked_before_anything_is_read(self):
        with pytest.raises(TypeError, match="got tragets"):
            moe_fast.from_experts(["no such folder"], tragets="mlp")
