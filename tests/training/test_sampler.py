"""DomainBatchSampler: each row once, composed by domain, ordered by (seed, epoch) alone."""

from __future__ import annotations

import functools
import pickle
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_fast.training import DomainBatchSampler


def make_dataset(*sizes: int) -> Dataset:
    """Domain d with sizes[d] rows, in blocks: the order in which a sampler must not leave them."""
    domains = [f"domain {d}" for d, size in enumerate(sizes) for _ in range(size)]
    return Dataset.from_dict({"anchor": ["x"] * len(domains), "domain": domains})


def sampler_of(dataset: Dataset, batch_size: int = 4, **kwargs) -> DomainBatchSampler:
    settings = {"drop_last": False, "mode": "mixed"} | kwargs
    return DomainBatchSampler(dataset, batch_size, **settings)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


SIZES = st.lists(st.integers(1, 13), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 9), st.sampled_from(["mixed", "single"]), st.integers(0, 3))
def test_every_row_exactly_once(sizes, batch_size, mode, epoch):
    sampler = sampler_of(make_dataset(*sizes), batch_size, mode=mode)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(flat(batches)) == list(range(sum(sizes)))
    assert len(sampler) == len(batches)
    assert all(0 < len(batch) <= batch_size for batch in batches)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 9), st.sampled_from(["mixed", "single"]))
def test_drop_last_drops_only_what_fills_no_batch(sizes, batch_size, mode):
    sampler = sampler_of(make_dataset(*sizes), batch_size, mode=mode, drop_last=True)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert all(len(batch) == batch_size for batch in batches)
    assert len(set(flat(batches))) == len(flat(batches))
    parts = [sum(sizes)] if mode == "mixed" else sizes
    assert len(batches) == sum(part // batch_size for part in parts)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 9))
def test_a_single_batch_is_of_one_domain(sizes, batch_size):
    dataset = make_dataset(*sizes)
    domain = dataset["domain"]
    for batch in sampler_of(dataset, batch_size, mode="single"):
        assert len({domain[row] for row in batch}) == 1


def test_single_batches_come_in_mixed_order():
    dataset = make_dataset(20, 20, 20)
    first = [dataset["domain"][b[0]] for b in sampler_of(dataset, mode="single")]
    assert first != sorted(first)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(2, 24))
def test_a_mixed_batch_has_each_domains_share(sizes, batch_size):
    dataset = make_dataset(*sizes)
    domain = list(dataset["domain"])
    for batch in sampler_of(dataset, batch_size, drop_last=True):
        counts = Counter(domain[row] for row in batch)
        for d, size in enumerate(sizes):
            share = batch_size * size / sum(sizes)
            # A batch is a stretch of the way whose length is right to within the rounding of all
            # domains, and a stretch holds a domain's share rounded up or down.
            slack = 1 + len(sizes) * size / sum(sizes)
            assert abs(counts[f"domain {d}"] - share) <= slack


def test_balanced_domains_are_balanced_in_every_batch():
    dataset = make_dataset(50, 50, 50, 50, 50)
    for batch in sampler_of(dataset, 20, drop_last=True):
        assert set(Counter(row // 50 for row in batch).values()) == {4}


@pytest.mark.parametrize("mode", ["mixed", "single"])
def test_the_order_depends_on_seed_and_epoch_alone(mode):
    dataset = make_dataset(9, 5, 7)

    def order(seed: int, epoch: int, before: int = 0, **kwargs) -> list[list[int]]:
        sampler = sampler_of(dataset, seed=seed, mode=mode, **kwargs)
        for earlier in range(before):
            sampler.set_epoch(earlier)
            list(sampler)
        torch.rand(1 + before)  # somebody else uses the global generator
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 2) == order(3, 2, before=2)
    assert order(3, 2) == order(3, 2, generator=torch.Generator().manual_seed(9))
    distinct = {str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(distinct) == 9  # seed 0 in epoch 1 is not seed 1 in epoch 0


def test_iterating_leaves_the_global_generator_alone():
    sampler = sampler_of(make_dataset(4, 4))
    state = torch.get_rng_state()
    list(sampler)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["mixed", "single"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_accelerates_shards_lose_no_row(mode, processes):
    """In "single" mode a smaller batch in the middle must not cost the others of its round."""
    dataset = make_dataset(9, 5, 7, 1)
    shards = []
    for index in range(processes):
        sampler = sampler_of(dataset, mode=mode, seed=1)
        shards.append(list(BatchSamplerShard(sampler, processes, index, even_batches=False)))
    assert sorted(flat(flat(shards))) == list(range(22))


def test_skipping_batches_resumes_the_same_epoch():
    dataset = make_dataset(9, 5, 7)
    whole = sampler_of(dataset)
    whole.set_epoch(4)
    again = sampler_of(dataset)
    again.set_epoch(4)
    assert list(SkipBatchSampler(again, 2)) == list(whole)[2:]


def test_integer_domains_and_other_columns():
    dataset = Dataset.from_dict({"anchor": ["x"] * 4, "source": [1, 0, 1, 0]})
    sampler = sampler_of(dataset, 2, mode="single", domain_column="source")
    assert {frozenset(batch) for batch in sampler} == {frozenset({0, 2}), frozenset({1, 3})}


def test_an_empty_dataset_has_no_batches():
    sampler = sampler_of(Dataset.from_dict({"anchor": [], "domain": []}))
    assert len(sampler) == 0
    assert list(sampler) == []


def test_a_partial_can_be_saved_with_the_training_arguments():
    partial = functools.partial(DomainBatchSampler, mode="single")
    again = pickle.loads(pickle.dumps(partial))
    assert again(make_dataset(2), batch_size=2, drop_last=False).mode == "single"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "paired"}, r"mode must be one of 'mixed', 'single'; got 'paired'"),
        ({"batch_size": 0}, r"batch_size must be at least 1; got 0"),
        ({"domain_column": "field"}, r"no column 'field' .* \['anchor', 'domain'\]"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(make_dataset(2, 2), **kwargs)


def test_a_row_without_domain_is_an_error():
    dataset = Dataset.from_dict({"anchor": ["x"] * 3, "domain": ["a", None, None]})
    with pytest.raises(ValueError, match="must name a domain in every row; 2 have none"):
        sampler_of(dataset)
