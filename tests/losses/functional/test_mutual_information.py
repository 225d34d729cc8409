"""domain_expert_joint and mutual_information: counted by hand, and as scikit-learn has it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import F64, assert_close, assert_same, property_test, randn

from moe_fast.losses.functional import domain_expert_joint, mutual_information


def joint_oracle(logits, domains, num_domains, mask) -> torch.Tensor:
    """[D, E] of one layer, a token at a time."""
    joint = [[torch.zeros((), dtype=F64)] * logits.shape[1] for _ in range(num_domains)]
    real = [t for t in range(len(logits)) if mask[t]]
    for t in real:
        p = logits[t].exp() / logits[t].exp().sum()
        for e in range(logits.shape[1]):
            joint[domains[t]][e] = joint[domains[t]][e] + p[e] / len(real)
    return torch.stack([torch.stack(row) for row in joint])


def information_oracle(joint) -> torch.Tensor:
    """sum J log(J / (J_d J_e)), the terms of absent domains left out."""
    total = torch.zeros((), dtype=F64)
    for row in joint:
        for e, cell in enumerate(row):
            if cell > 0:
                total = total + cell * (cell / (row.sum() * joint[:, e].sum())).log()
    return total


@property_test
@given(
    tokens=st.integers(1, 9),
    num_domains=st.integers(1, 4),
    experts=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 999),
)
def test_is_the_definition_in_value_and_gradient(tokens, num_domains, experts, seed):
    """Also with domains that the batch lacks."""
    logits = randn(tokens, experts, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    domains = torch.randint(0, num_domains, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.7
    mask[0] = True
    joint = domain_expert_joint(logits, domains, num_domains, mask)
    expected = joint_oracle(logits, domains, num_domains, mask)
    assert_close(joint, expected)
    value, wanted = mutual_information(joint), information_oracle(expected)
    assert_close(value, wanted)
    ours, theirs = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, wanted))
    assert_close(ours, theirs)


def test_layers_are_apart():
    logits, domains = randn(3, 6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    mask = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    joint = domain_expert_joint(logits, domains, 3, mask)
    assert joint.shape == (3, 3, 4)
    each = [information_oracle(joint_oracle(layer, domains, 3, mask)) for layer in logits]
    assert_same(
        lambda: mutual_information(domain_expert_joint(logits, domains, 3, mask)).sum(),
        lambda: sum(information_oracle(joint_oracle(layer, domains, 3, mask)) for layer in logits),
        logits,
    )
    assert_close(mutual_information(joint), torch.stack(each))


def test_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    counts = np.random.default_rng(0).integers(0, 20, (4, 3))
    expected = metrics.mutual_info_score(None, None, contingency=counts)
    joint = torch.tensor(counts / counts.sum())
    assert mutual_information(joint).item() == pytest.approx(expected, rel=1e-12)


def test_the_bounds():
    """0 where the routing does not depend on the domain; log E where it tells it."""
    alike = torch.tensor([[0.1, 0.3], [0.15, 0.45]], dtype=F64)
    assert mutual_information(alike).item() == pytest.approx(0.0, abs=1e-15)
    told = torch.eye(4, dtype=F64) / 4
    assert mutual_information(told).item() == pytest.approx(math.log(4))


def test_each_token_counts_once():
    """A long text weighs by its tokens: [P(d)] is 3/4, 1/4, not 1/2 each or squared."""
    domains = torch.tensor([0, 0, 0, 1])
    joint = domain_expert_joint(torch.zeros(4, 2, dtype=F64), domains, 2)
    assert_close(joint.sum(1), torch.tensor([0.75, 0.25], dtype=F64))


def test_processes_add_up():
    logits, domains = randn(2, 8, 3), torch.arange(8) % 3
    sums: list[torch.Tensor] = []
    domain_expert_joint(logits[:, 5:], domains[5:], 3, reduce=lambda t: sums.append(t) or t)
    joint = domain_expert_joint(logits[:, :5], domains[:5], 3, reduce=lambda t: t + sums[0])
    assert_close(joint, domain_expert_joint(logits, domains, 3))


def test_certain_routing_has_a_finite_gradient():
    """Probabilities that underflow to 0 and a domain that is not there: no NaN."""
    logits = torch.tensor([[500.0, -500.0], [-500.0, 500.0]], requires_grad=True)
    value = mutual_information(domain_expert_joint(logits, torch.tensor([0, 2]), 3))
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert logits.grad.isfinite().all()


def test_no_real_token_gives_zero():
    joint = domain_expert_joint(torch.zeros(2, 3), torch.tensor([0, 1]), 2, torch.zeros(2).bool())
    assert joint.abs().max() == 0.0
    assert mutual_information(joint).item() == 0.0


def test_autocast_does_not_reach_the_sums():
    logits, domains = randn(7, 3, dtype=torch.float32), torch.arange(7) % 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        joint = domain_expert_joint(logits, domains, 2)
    assert joint.dtype == torch.float32
    expected = joint_oracle(logits.double(), domains, 2, torch.ones(7))
    assert_close(joint, expected, 1e-6)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (torch.tensor([0, 2]), r"domain_ids must lie in \[0, num_domains\) = \[0, 2\); got 2"),
        (torch.tensor([-1, 0]), "got -1"),
        (torch.tensor([0]), "domain_ids must have shape"),
    ],
)
def test_bad_domain_ids_are_named(domains, message):
    with pytest.raises(ValueError, match=message):
        domain_expert_joint(torch.zeros(2, 3), domains, 2)
