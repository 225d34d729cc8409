"""PEFT: LoRA on stacked experts by parameter targeting, beside LoRA on the attention."""

import re
import shutil

import numpy as np
import pytest
import torch
import transformers

import moe_fast
from tests.models.tiny import CLS, NAMES, build, relative_error

peft = pytest.importorskip("peft", reason="needs peft")

ATTENTION = {"modernbert": ["Wqkv"]}
EXPERTS = {"modernbert": ["mlp.gate_up_proj", "mlp.down_proj"]}


def mixture(name, **settings):
    settings = {"num_experts_per_tok": 2, **settings}
    return moe_fast.upcycle(build(name).double(), num_experts=3, layers="alternate", **settings)


def config(name, attention=True):
    return peft.LoraConfig(
        r=2,
        target_modules=ATTENTION.get(name, ["query", "value"]) if attention else [],
        target_parameters=EXPERTS.get(name, ["mlp.up_proj", "mlp.down_proj"]),
    )


def randomize(model):
    """LoRA's B starts at 0, where adapters do nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def output(model, batch, **options):
    return model(**batch, **options).last_hidden_state[batch["attention_mask"].bool()]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 60, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_changes_the_adapters_alone(name, batch):
    moe = mixture(name)
    before = output(moe, batch)
    model = peft.get_peft_model(moe, config(name))
    assert torch.equal(output(model, batch), before), "adapters start as nothing"
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(2)).double()
    losses = []
    for _ in range(4):
        loss = (output(model, batch) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for parameter_name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, start[parameter_name])
        assert changed == ("lora_" in parameter_name), parameter_name
    assert any(".mlp." in n and "lora_B" in n for n in start), "the experts have adapters"


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_unmerged_and_is_a_plain_mixture(name, batch, tmp_path):
    model = randomize(peft.get_peft_model(mixture(name), config(name)))
    want = output(model, batch)
    merged = model.merge_and_unload()
    assert type(merged) is type(mixture(name))
    assert relative_error(output(merged, batch), want) <= 1e-12
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert again.keys() == mixture(name).state_dict().keys()
    assert all(torch.equal(again[n], value) for n, value in merged.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_saved_adapter_is_loaded_onto_the_same_mixture(name, batch, tmp_path):
    model = randomize(peft.get_peft_model(mixture(name), config(name)))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mixture(name), tmp_path)
    assert torch.equal(output(again, batch), output(model, batch))


def test_an_expert_that_no_text_visits_gets_no_gradient(batch):
    """So the low-rank pairs are one per expert: theirs is the change that each merge makes."""
    moe = mixture("bert", routing="enforced", num_experts_per_tok=1)
    model = peft.get_peft_model(moe, config("bert", attention=False))
    old = {i: mlp.up_proj.detach().clone() for i, mlp in moe.moe_mlps().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B starts at 0: A has a gradient from the second step on
        optimizer.zero_grad()
        output(model, batch, expert_ids=torch.tensor([0, 2, 2])).pow(3).sum().backward()
        optimizer.step()
    merged = model.merge_and_unload()
    for layer, mlp in merged.moe_mlps().items():
        change = (mlp.up_proj - old[layer]).abs().amax(dim=(1, 2))
        assert change[1] == 0 and change[0] > 0 and change[2] > 0


def test_routing_outputs_and_counts_stay(batch):
    moe = mixture("bert")
    total, active = moe.num_parameters(), moe.num_parameters(only_active=True)
    model = peft.get_peft_model(moe, config("bert"))
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert moe.num_parameters() == total + lora
    assert moe.num_parameters(only_active=True) == active + lora
    outputs = model(**batch, output_router_logits=True)
    assert len(outputs.router_logits) == len(outputs.tokens_per_expert) == 1


def test_gradient_checkpointing(batch):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = randomize(peft.get_peft_model(mixture("bert"), config("bert"))).train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        output(model, batch).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-10, atol=1e-12), name


def test_experts_cannot_be_taken_out_before_merging():
    moe = mixture("bert")
    peft.get_peft_model(moe, config("bert"))
    for change in (
        lambda: moe_fast.extract_expert(moe, 0),
        lambda: moe_fast.add_expert(moe),
        lambda: moe_fast.remove_expert(moe, 0),
    ):
        with pytest.raises(ValueError, match=r"no PEFT adapters in it.*merge_and_unload"):
            change()


def test_target_modules_do_not_find_stacked_parameters():
    with pytest.raises(ValueError, match="up_proj"):
        peft.get_peft_model(mixture("bert"), peft.LoraConfig(target_modules=["up_proj"]))


@pytest.fixture
def accepted(monkeypatch):
    """transformers takes whatever peft is installed; what it asks for then works with any."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")


@pytest.fixture
def refused(monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")


@pytest.fixture(scope="module")
def mixture_folder(folder, tmp_path_factory):
    """A saved mixture with domains a, b and c."""
    place = tmp_path_factory.mktemp("base")
    moe = moe_fast.upcycle(folder, num_experts=3, routing="enforced", domains=["a", "b", "c"])
    moe.save_pretrained(str(place))
    return place


def check_saved_with_its_adapter(model, base, place):
    """What was saved is an adapter; both classes load it with the base that it names."""
    from sentence_transformers import SentenceTransformer

    want = model.encode(["w3 w4 w5"], domain="b")
    unadapted = moe_fast.MoESentenceTransformer(str(base), device="cpu")
    assert abs(want - unadapted.encode(["w3 w4 w5"], domain="b")).max() > 1e-3
    model.save_pretrained(str(place))
    assert (place / "adapter_model.safetensors").exists()
    assert not (place / "model.safetensors").exists()
    for cls in (moe_fast.MoESentenceTransformer, SentenceTransformer):
        again = cls(str(place), device="cpu")
        # The stock class pads and takes torch's attention: the same but for rounding.
        np.testing.assert_allclose(again.encode(["w3 w4 w5"], domain="b"), want, atol=1e-5)


def test_sentence_transformer_with_an_adapter(mixture_folder, tmp_path, accepted):
    """The base is saved, the adapter beside it refers to it, the stock class loads both."""
    base = tmp_path / "base"
    shutil.copytree(mixture_folder, base)
    model = moe_fast.MoESentenceTransformer(str(base), device="cpu")
    model.add_adapter(config("bert"))
    check_saved_with_its_adapter(randomize(model), base, tmp_path / "adapter")
    model.save_pretrained(str(base))
    assert (base / "model.safetensors").exists(), "beside the base, which it needs"


def test_sentence_transformer_with_pefts_own_functions(mixture_folder, tmp_path, refused):
    """They do not go through transformers, whatever version of peft that asks for."""
    model = moe_fast.MoESentenceTransformer(str(mixture_folder), device="cpu")
    model[0].model = peft.get_peft_model(model[0].model, config("bert"))
    check_saved_with_its_adapter(randomize(model), mixture_folder, tmp_path / "adapter")


@pytest.mark.parametrize("wrapped", [False, True])
def test_versions_that_do_not_fit_are_named_with_what_works(mixture_folder, refused, wrapped):
    model = moe_fast.MoESentenceTransformer(str(mixture_folder), device="cpu")
    message = (
        rf"transformers {re.escape(transformers.__version__)} refuses peft "
        rf"{re.escape(peft.__version__)}.*99\.0.*peft\.get_peft_model\(model, config\)"
    )
    with pytest.raises(ValueError, match=message):
        (model if wrapped else model[0].model).add_adapter(config("bert"))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_load_adapter_works_or_names_the_versions(mixture_folder, tmp_path, refused, batch):
    """Some releases of transformers look at peft's version in load_adapter, some do not."""
    model = transformers.AutoModel.from_pretrained(mixture_folder)
    adapted = randomize(peft.get_peft_model(model, config("bert"))).eval()
    batch["input_ids"][:, 0] = CLS
    want = output(adapted, batch, domain="b")
    adapted.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(mixture_folder)
    try:
        again.load_adapter(str(tmp_path))
    except ValueError as error:
        assert re.search(r"refuses peft .*peft\.PeftModel\.from_pretrained", str(error))
        again = peft.PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(output(again.eval(), batch, domain="b"), want)


def test_other_errors_of_adapters_stay_as_they_are(mixture_folder, accepted):
    model = transformers.AutoModel.from_pretrained(mixture_folder)
    with pytest.raises(ValueError, match="no_such_module"):
        model.add_adapter(peft.LoraConfig(target_modules=["no_such_module"]))


def test_a_base_that_peft_wrapped_is_not_saved_as_if_it_were_whole(tmp_path):
    """Its weights have other names, under which nothing finds them again."""
    moe = mixture("bert")
    model = peft.get_peft_model(moe, config("bert"))
    with pytest.raises(ValueError, match=r"merge_and_unload\(\), or.*PeftModel.save_pretrained"):
        moe.save_pretrained(tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    model.merge_and_unload().save_pretrained(tmp_path / "moe")
    assert (tmp_path / "moe" / "model.safetensors").exists()


def test_an_adapter_needs_a_base_that_was_saved(folder):
    """Not the dense model that the mixture came from, which the adapter does not fit."""
    names = ["a", "b", "c"]
    fresh = moe_fast.upcycle(folder, num_experts=3, routing="enforced", domains=names)
    for model in (fresh, moe_fast.models.add_expert(fresh, "d")):
        with pytest.raises(
            ValueError, match="add_adapter needs a mixture loaded from where it was"
        ):
            model.add_adapter(config("bert"))


def test_an_adapter_on_a_fresh_mixture_is_saved_without_a_base(tmp_path, batch):
    """PEFT compares vocabularies with the base's, which would be the dense model's."""
    build("bert").save_pretrained(tmp_path / "dense")
    batch["input_ids"][:, 0] = CLS

    def fresh():
        settings = {"num_experts": 2, "routing": "enforced", "domains": ["a", "b"]}
        return moe_fast.upcycle(str(tmp_path / "dense"), **settings, cls_token_id=CLS)

    model = randomize(peft.get_peft_model(fresh(), config("bert")))
    want = output(model, batch, domain="b")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert torch.equal(output(again.eval(), batch, domain="b"), want)
