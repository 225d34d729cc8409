"""RouterLoss: every term by loops over the encoder's own logits, around any loss and wrapper."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

pytest.importorskip("sentence_transformers")

import router_oracle as oracle
from loss_checks import assert_close
from router_oracle import batch_of
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from tiny_models import DOMAINS, make_dense, make_moe, make_pairs

from moe_fast.layers import MoEMLP, MoERouter
from moe_fast.losses import CachedLoss, InfoNCELoss, MatryoshkaLoss, RouterLoss
from moe_fast.training import MoESentenceTransformerTrainer
from moe_fast.training.loss_state import own_state

COEFFICIENTS = {
    "load_balance": 0.3,
    "z_loss": 0.2,
    "mutual_information": 0.7,
    "expert_supervision": 0.4,
}
SIGNS = {name: -1 if name == "mutual_information" else 1 for name in COEFFICIENTS}


def learned(**settings) -> nn.Module:
    """Learned routing in float64; the router knows the texts only, no domain tokens."""
    settings = {"routing": "token_topk", "domains": None} | settings
    model = make_moe(**settings).double()
    with torch.no_grad():  # logits of the size of 1: the routers' own start is nearly uniform
        for module in model.modules():
            if isinstance(module, MoERouter):
                module.weight *= 20
    return model


def pairs_batch(model, rows: int = 5, negatives: int = 0) -> list[dict]:
    names = ["anchor", "positive", *(f"negative_{g}" for g in range(negatives))]
    return batch_of(model, make_pairs(rows, negatives=negatives), *names)


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    assert any(g.abs().max() > 1e-4 for name, g in expected.items() if "router" in name)
    for name in expected:
        assert_close(actual[name], expected[name], tolerance)


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_experts_per_tok": 2}, {"routing": "sentence_topk"}])
def test_is_the_loss_plus_every_term(settings):
    model = learned(**settings)
    columns = pairs_batch(model)
    inner = InfoNCELoss(model)
    loss = RouterLoss(inner, **COEFFICIENTS, num_domains=3)
    total = loss(columns)
    k = settings.get("num_experts_per_tok", 1)
    terms = oracle.terms(model, columns, k)
    if "routing" in settings:  # the slots are the sentence's: loops over tokens know them not
        terms["load_balance"] = sentence_balance(model, columns)
    expected = inner(columns) + sum(SIGNS[n] * COEFFICIENTS[n] * t for n, t in terms.items())
    assert_close(total, expected)
    assert_same_gradients(gradients(total, model), gradients(expected, model))
    terms["mutual_information"] = terms["mutual_information"] / 2  # the mean over two layers
    for name, term in terms.items():
        assert_close(loss.last_metrics[name], term.detach())
    assert "in_batch_accuracy" in loss.last_metrics
    assert not any(value.requires_grad for value in loss.last_metrics.values())


def sentence_balance(model, columns) -> torch.Tensor:
    tokens = oracle.real_tokens(model, columns, 1)
    for layer in range(2):
        for text in {t.text for t in tokens}:
            own = [t for t in tokens if t.text == text]
            mean = sum(t.logits[layer] for t in own) / len(own)
            for t in own:
                t.experts[layer] = [int(mean.argmax())]
    return oracle.load_balance(tokens)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_term_alone(name):
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **{name: 2.0}, num_domains=3)
    expected = InfoNCELoss(model)(columns) + 2.0 * SIGNS[name] * oracle.terms(model, columns)[name]
    assert_close(loss(columns), expected)
    assert set(loss.last_metrics) == {"in_batch_accuracy", name}


def test_without_coefficients_it_is_the_loss():
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model))
    assert torch.equal(loss(columns), InfoNCELoss(model)(columns))
    assert set(loss.last_metrics) == {"in_batch_accuracy"}


def test_the_models_own_domains_are_known():
    model = make_moe(routing="token_topk").double()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), mutual_information=1.0, expert_supervision=1.0)
    assert loss.num_domains == 3
    value = loss(columns)
    for column in columns:  # another domain token in front: another value
        column["domain_ids"] = 2 - column["domain_ids"]
    assert value != loss(columns)


# --- around any loss -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "negatives"),
    [
        (lambda m: theirs.MultipleNegativesRankingLoss(m), 0),
        (lambda m: theirs.MultipleNegativesRankingLoss(m), 2),  # merges columns 2 .. 4 in one pass
        (lambda m: theirs.CoSENTLoss(m), 0),
        (lambda m: theirs.MatryoshkaLoss(m, theirs.MultipleNegativesRankingLoss(m), [16, 8]), 2),
        (lambda m: MatryoshkaLoss(InfoNCELoss(m), [16, 8]), 1),
    ],
)
def test_around_losses_that_encode_in_their_own_way(make, negatives):
    model = learned()
    columns = pairs_batch(model, negatives=negatives)
    labels = torch.linspace(0, 1, 5, dtype=torch.float64)
    inner = make(model)
    loss = RouterLoss(inner, **COEFFICIENTS, num_domains=3)
    total = loss(columns, labels)
    terms = oracle.terms(model, columns)
    expected = inner(columns, labels)
    expected = expected + sum(SIGNS[n] * COEFFICIENTS[n] * t for n, t in terms.items())
    assert_close(total, expected)


class TermsLoss(nn.Module):
    """A loss of several terms, as sentence-transformers allows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, labels=None):
        embedding = self.model(dict(next(iter(features))))["sentence_embedding"]
        return {"mean": embedding.mean(), "square": embedding.square().mean()}


def test_a_dict_of_terms_gets_one_more():
    model = learned()
    columns = pairs_batch(model)[:1]
    result = RouterLoss(TermsLoss(model), z_loss=0.5)(columns)
    assert set(result) == {"mean", "square", "router"}
    assert_close(result["router"], 0.5 * oracle.terms(model, columns)["z_loss"])


def test_texts_that_were_not_encoded_are_noticed():
    model = learned()
    columns = pairs_batch(model)
    only_balance = RouterLoss(TermsLoss(model), load_balance=1.0)(columns)
    assert set(only_balance) == {"mean", "square", "router"}
    with pytest.raises(ValueError, match="columns hold 10 texts, the loss encoded 5"):
        RouterLoss(TermsLoss(model), mutual_information=1.0, num_domains=3)(columns)


def test_a_loss_with_a_gradient_cache_is_refused():
    model = learned()
    cached = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    with pytest.raises(ValueError, match="got CachedMultipleNegativesRankingLoss"):
        RouterLoss(cached, load_balance=1.0)
    with pytest.raises(ValueError, match="CachedLoss around the RouterLoss"):
        RouterLoss(CachedLoss(InfoNCELoss(model)), load_balance=1.0)


def test_a_gradient_cache_that_does_not_say_so_is_noticed():
    model = learned()
    cached = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    cached.uses_gradient_cache = False
    with pytest.raises(ValueError, match="ran without gradients inside the loss"):
        RouterLoss(cached, load_balance=1.0)(pairs_batch(model))


# --- wrappers and modes --------------------------------------------------------------------------


def test_under_gradient_checkpointing_the_gradient_is_the_same():
    model = learned().train()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    expected = gradients(loss(columns), model)
    encoder = oracle.encoder_of(model)
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(loss(columns), model), expected)
    encoder.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        loss(columns)


def test_wrapped_models_are_looked_through():
    class Wrapper(nn.Module):  # as DistributedDataParallel holds its module
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, features):
            return self.module(features)

    model = learned()
    columns = pairs_batch(model)
    expected = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)(columns)
    loss = RouterLoss(InfoNCELoss(Wrapper(model)), **COEFFICIENTS, num_domains=3)
    assert torch.equal(loss(columns), expected)
    unwrapped = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    unwrapped.loss.model = Wrapper(model)  # the trainer wraps the model after the loss is made
    assert torch.equal(unwrapped(columns), expected)


class OneLayer(nn.Module):
    """An encoder that compiles quickly: embeddings, one mixture, their mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8)
        self.mlp = MoEMLP(8, 8, 3)

    def forward(self, features):
        return {"sentence_embedding": self.mlp(self.embedding(features["input_ids"])).mean(1)}


def one_layer_batch() -> list[dict]:
    texts = torch.randint(0, 30, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "domain_ids": torch.tensor([0, 1, 2, 0])} for ids in texts]


def test_compiled_models():
    """The hooks come before the first trace; a run outside the loss changes nothing."""
    model, columns = OneLayer(), one_layer_batch()
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    expected = loss(columns)
    expected_gradients = gradients(expected, model)
    loss.loss.model = compiled = torch.compile(model, backend="eager")
    compiled(columns[0])
    for _ in range(2):
        value = loss(columns)
        assert_close(value, expected, 1e-6)
    assert_same_gradients(gradients(value, model), expected_gradients, 1e-6)


def test_routers_that_were_not_seen_are_noticed():
    """A model compiled and run before the loss was made ignores the hooks that came later."""
    torch.compiler.reset()  # the class may have been traced with its hooks, by the test before
    model, columns = OneLayer(), one_layer_batch()
    compiled = torch.compile(model, backend="eager")
    compiled({"input_ids": columns[0]["input_ids"]})
    loss = RouterLoss(InfoNCELoss(compiled), load_balance=1.0)
    with pytest.raises(RuntimeError, match="before the model's first run under torch.compile"):
        loss(columns)


def test_without_gradients_and_in_evaluation():
    model = learned().eval()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    with_graph = loss(columns)
    with torch.no_grad():
        value = loss(columns)
    assert not value.requires_grad
    assert torch.equal(value, with_graph)


def test_without_gradients_no_process_waits_for_another(monkeypatch):
    """In evaluation the processes' numbers of batches differ: a message would hang the last."""
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    sums = []
    monkeypatch.setattr("moe_fast.losses.router.global_sum", lambda t: sums.append(t) or t)
    with torch.no_grad():
        loss(columns)
    assert not sums
    loss(columns)
    assert len(sums) == len(COEFFICIENTS), "every term is the global batch's in training"


def test_autocast_leaves_the_terms_in_float32():
    model = learned().float()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(columns)
        terms = {name: loss.last_metrics[name] for name in COEFFICIENTS}
    assert value.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    value.backward()
    exact = oracle.terms(model, columns)
    assert terms["z_loss"].item() == pytest.approx(exact["z_loss"].item(), rel=0.05)


# --- nothing leaks -------------------------------------------------------------------------------


def test_two_forwards_are_independent_and_nothing_is_kept():
    model = learned()
    columns, other = pairs_batch(model), pairs_batch(model, rows=3)
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    first = loss(columns)
    loss(other)
    model(columns[0] | {})  # outside
    assert torch.equal(loss(columns), first)
    hooks = [len(m._forward_hooks) for m in model.modules() if isinstance(m, MoERouter)]
    RouterLoss(InfoNCELoss(model), load_balance=1.0)
    assert hooks == [len(m._forward_hooks) for m in model.modules() if isinstance(m, MoERouter)]


def test_an_error_inside_the_loss_closes_the_record():
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model, negatives_from="all"), load_balance=1.0)
    expected = loss(columns)
    with pytest.raises(ValueError, match="at least two text columns"):
        loss(columns[:1])
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        loss([columns[0], {"domain_ids": columns[0]["domain_ids"]}])
    assert torch.equal(loss(columns), expected)


def test_a_copied_model_is_recorded_for_its_own_loss():
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **COEFFICIENTS, num_domains=3)
    expected = loss(columns)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    RouterLoss(InfoNCELoss(copied), **COEFFICIENTS, num_domains=3)(columns)
    assert torch.equal(loss(columns), expected)


# --- the running joint ---------------------------------------------------------------------------


def test_the_running_joint():
    """R = decay * R + (1 - decay) * J, normalised; the batch's J alone has a gradient."""
    model = learned().train()
    decay, running = 0.8, [0.0, 0.0]
    loss = RouterLoss(
        InfoNCELoss(model), mutual_information=1.0, num_domains=3, joint_decay=decay
    ).double()
    for step in range(3):
        columns = batch_of(model, make_pairs(4, seed=step), "anchor", "positive")
        total = loss(columns) - InfoNCELoss(model)(columns)
        tokens = oracle.real_tokens(model, columns, 1)
        domains = [int(d) for column in columns for d in column["domain_ids"]]
        mixed = [
            decay * running[layer] + (1 - decay) * oracle.joint(tokens, domains, layer)
            for layer in range(2)
        ]
        each = [oracle.information(m / m.detach().sum()) for m in mixed]
        assert_close(total, -sum(each))
        assert_same_gradients(gradients(total, model), gradients(-sum(each), model), 1e-9)
        running = [m.detach() for m in mixed]
        assert_close(loss.running_joint, torch.stack(running))
    before = loss.running_joint.clone()
    model.eval()
    columns = pairs_batch(model)
    value = loss(columns) - InfoNCELoss(model)(columns)
    assert torch.equal(loss.running_joint, before)
    assert_close(value, -oracle.terms(model, columns)["mutual_information"])


def test_batches_of_one_domain_have_information_only_with_a_running_joint():
    model = learned().train()
    pairs = make_pairs(9)
    loss = RouterLoss(InfoNCELoss(model), mutual_information=1.0, num_domains=3)
    running = RouterLoss(
        InfoNCELoss(model), mutual_information=1.0, num_domains=3, joint_decay=0.9
    ).double()
    for domain in DOMAINS:
        rows = pairs.filter(lambda row, domain=domain: row["domain"] == domain)
        columns = batch_of(model, rows, "anchor", "positive")
        loss(columns)
        running(columns)
    assert loss.last_metrics["mutual_information"].item() == pytest.approx(0.0, abs=1e-12)
    assert running.last_metrics["mutual_information"].item() > 0.01


def test_the_running_joint_is_saved_with_the_loss():
    model = make_moe(routing="token_topk")
    inner = InfoNCELoss(model, learn_temperature=True)
    loss = RouterLoss(inner, mutual_information=1.0, joint_decay=0.9)
    assert set(own_state(loss)) == {"running_joint", "loss.log_temperature"}
    assert own_state(loss)["running_joint"].shape == (2, 3, 3)
    assert own_state(RouterLoss(InfoNCELoss(model), mutual_information=1.0)) == {}


# --- training ------------------------------------------------------------------------------------


def measured_information(model) -> list[float]:
    """I(domain; expert) of each layer on held-out texts, counted by loops."""
    model.eval()
    columns = batch_of(model, make_pairs(30, seed=999), "anchor")
    domains = [int(d) for d in columns[0]["domain_ids"]]
    with torch.no_grad():
        tokens = oracle.real_tokens(model, columns, 1)
        joints = [oracle.joint(tokens, domains, layer) for layer in range(2)]
    model.train()
    return [float(oracle.information(joint)) for joint in joints]


def train(coefficient: float, steps: int = 250) -> tuple[list[float], list[float]]:
    """Information before and after; the router sees the texts only, not the domains."""
    model = make_moe(routing="token_topk", domains=None)
    before = measured_information(model)
    loss = RouterLoss(InfoNCELoss(model), mutual_information=coefficient, num_domains=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        columns = batch_of(model, make_pairs(24, seed=step), "anchor", "positive")
        optimizer.zero_grad()
        loss(columns).backward()
        optimizer.step()
    return before, measured_information(model)


def test_mutual_information_trains_the_router():
    """From under .05 to over half of log E, on texts not trained on, in every layer."""
    before, after = train(coefficient=1.0)
    assert max(before) < 0.05
    assert min(after) > oracle.LOG_E / 2


def test_without_it_the_router_learns_no_domains():
    before, after = train(coefficient=0.0)
    assert max(before) < 0.05
    assert max(after) < 0.05


def test_in_the_trainer(tmp_path):
    """Terms in the logs, the running joint in the checkpoint and back after resuming."""
    model = make_moe(routing="token_topk")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=6,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer() -> MoESentenceTransformerTrainer:
        inner = InfoNCELoss(model, learn_temperature=True)
        loss = RouterLoss(inner, **COEFFICIENTS, joint_decay=0.9)
        return MoESentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=make_pairs(12), loss=loss
        )

    first = trainer()
    first.train()
    logged = [entry for entry in first.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert {*COEFFICIENTS, "in_batch_accuracy", "temperature"} <= set(entry)
    joint = own_state(first.loss)["running_joint"]
    torch.testing.assert_close(joint.sum((-2, -1)), torch.full((2,), 1 - 0.9**2))
    second = trainer()
    second.train(resume_from_checkpoint=True)  # nothing left to do but to load
    assert torch.equal(own_state(second.loss)["running_joint"], joint)


# --- settings and bad input ----------------------------------------------------------------------


def test_config_is_for_the_model_card():
    loss = RouterLoss(InfoNCELoss(learned()), **COEFFICIENTS, num_domains=3, joint_decay=0.5)
    assert loss.get_config_dict() == {
        "loss": "InfoNCELoss",
        **COEFFICIENTS,
        "reduction": "sum",
        "num_domains": 3,
        "joint_decay": 0.5,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_balance": -0.1}, "load_balance must be at least 0 and finite; got -0.1"),
        ({"z_loss": math.inf}, "z_loss must be at least 0 and finite; got inf"),
        ({"mutual_information": 1.0}, r"num_domains must be given for \['mutual_information'\]"),
        ({"expert_supervision": 1.0}, r"num_domains must be given for \['expert_supervision'\]"),
        ({"num_domains": 0}, "num_domains must be at least 1; got 0"),
        (
            {"expert_supervision": 1.0, "num_domains": 4},
            "num_domains must be at most num_experts = 3; got 4",
        ),
        ({"joint_decay": 1.0}, r"joint_decay must lie in \(0, 1\); got 1.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RouterLoss(InfoNCELoss(learned()), **settings)


def test_more_domains_than_experts_are_fine_for_information():
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), mutual_information=1.0, num_domains=7)
    expected = InfoNCELoss(model)(columns) - oracle.terms(model, columns)["mutual_information"]
    assert_close(loss(columns), expected)


def test_models_without_learned_routers_are_refused():
    with pytest.raises(ValueError, match="must have mixture-of-experts layers"):
        RouterLoss(InfoNCELoss(make_dense()), load_balance=1.0)
    with pytest.raises(ValueError, match="its routing is 'enforced'"):
        RouterLoss(InfoNCELoss(make_moe(routing="enforced")), load_balance=1.0)


def test_a_loss_without_an_encoder_is_refused():
    with pytest.raises(TypeError, match="must have its encoder as the attribute `model`"):
        RouterLoss(nn.MSELoss(), load_balance=1.0)


@pytest.mark.parametrize("name", ["mutual_information", "expert_supervision"])
def test_missing_or_wrong_domain_ids_are_named_before_anything_is_encoded(name):
    model = learned()
    columns = pairs_batch(model)
    loss = RouterLoss(InfoNCELoss(model), **{name: 1.0}, num_domains=3)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    del columns[1]["domain_ids"]
    with pytest.raises(ValueError, match=rf"{name}: domain_ids must be in .*; column 1 has \['att"):
        loss(columns)
    columns[1]["domain_ids"] = torch.tensor([0, 1, 2, 3, 0])
    with pytest.raises(ValueError, match=r"domain_ids must lie in .*\[0, 3\); got 3"):
        loss(columns)
    assert not ran


def test_the_mean_over_layers_is_the_sum_divided_by_their_number():
    """But supervision, which is one term of all layers."""
    model = learned()
    columns = pairs_batch(model)
    for column in columns:
        column["domain_ids"] = torch.arange(5) % len(DOMAINS)
    layers = len(model.transformers_model.moe_mlps())
    assert layers > 1
    for name in COEFFICIENTS:
        settings = {name: 1.0, "num_domains": len(DOMAINS)}
        plain = InfoNCELoss(model)(columns)
        summed = RouterLoss(InfoNCELoss(model), **settings)(columns) - plain
        mean = RouterLoss(InfoNCELoss(model), reduction="mean", **settings)(columns) - plain
        expected = summed if name == "expert_supervision" else summed / layers
        assert_close(mean, expected)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean'.*got 'max'"):
        RouterLoss(InfoNCELoss(model), load_balance=1.0, reduction="max")
