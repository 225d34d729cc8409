"""The batcher, with a function in place of the model."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.serving.batcher import Batcher, ClosedError, QueueFullError, Text


def text(length, value=0, **fields):
    return Text(np.full(length, value, np.int32), **fields)


def first_ids(texts):
    """The vector of a text: its first id, and its length."""
    return np.array([[t.ids[0], len(t.ids)] for t in texts], np.float32)


class Gate:
    """Computes first_ids, but not before it is opened; remembers the batches."""

    def __init__(self):
        self.batches = []
        self.begun = threading.Event()
        self.opened = threading.Event()

    def __call__(self, texts):
        self.batches.append(texts)
        self.begun.set()
        assert self.opened.wait(30)
        return first_ids(texts)


@pytest.fixture
def make():
    made = []

    def make(compute=first_ids, **settings):
        defaults = {"max_batch_tokens": 10, "max_queue_tokens": 100, "max_wait": 0.0}
        made.append(Batcher(compute, **{**defaults, **settings}))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


@given(
    st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 30),
)
def test_every_request_gets_its_own_vectors_in_order(requests, max_batch_tokens):
    sizes = []

    def compute(texts):
        sizes.append([len(t.ids) for t in texts])
        return first_ids(texts)

    batcher = Batcher(
        compute, max_batch_tokens=max_batch_tokens, max_queue_tokens=10**6, max_wait=0.001
    )
    jobs = [
        [text(length, 100 * r + i) for i, length in enumerate(lengths)]
        for r, lengths in enumerate(requests)
    ]
    with ThreadPoolExecutor(len(jobs)) as clients:
        futures = list(clients.map(batcher.submit, jobs))
    results = [future.result(30) for future in futures]
    batcher.close()
    for job, result in zip(jobs, results, strict=True):
        np.testing.assert_array_equal(result, first_ids(job))
    assert all(sum(batch) <= max_batch_tokens or len(batch) == 1 for batch in sizes)
    assert sum(map(len, sizes)) == sum(map(len, requests))
    assert batcher.waiting_tokens == 0


def test_a_short_request_does_not_wait_for_all_of_a_long_one(make):
    gate = Gate()
    batcher = make(gate)
    batcher.submit([text(1)])
    gate.begun.wait(30)
    long = batcher.submit([text(5, i) for i in range(10)])
    short = batcher.submit([text(5, 77)])
    gate.opened.set()
    assert short.result(30)[0, 0] == 77
    long.result(30)
    assert [t.ids[0] for t in gate.batches[1]] == [0, 77]


def test_texts_whose_pooling_leaves_out_other_prompts_are_computed_apart(make):
    gate = Gate()
    batcher = make(gate, max_batch_tokens=100)
    batcher.submit([text(1)])
    gate.begun.wait(30)
    futures = [batcher.submit([text(1, i, prompt_length=i % 2)]) for i in range(4)]
    gate.opened.set()
    assert [f.result(30)[0, 0] for f in futures] == [0, 1, 2, 3]
    kinds = [{t.prompt_length for t in batch} for batch in gate.batches[1:]]
    assert kinds == [{0}, {1}]


def test_a_failing_text_fails_its_own_request_alone(make):
    def compute(texts):
        if any(t.ids[0] == 13 for t in texts):
            raise ValueError("unlucky")
        return first_ids(texts)

    gate = Gate()

    def gated(texts):
        gate(texts)
        return compute(texts)

    batcher = make(gated, max_batch_tokens=100)
    batcher.submit([text(1)])
    gate.begun.wait(30)
    bad = batcher.submit([text(1, 5), text(1, 13), text(1, 6)])
    good = [batcher.submit([text(1, i)]) for i in range(3)]
    gate.opened.set()
    with pytest.raises(ValueError, match="unlucky"):
        bad.result(30)
    assert [f.result(30)[0, 0] for f in good] == [0, 1, 2]


def test_a_full_queue_refuses_and_says_when_to_come_again(make):
    gate = Gate()
    batcher = make(gate, max_queue_tokens=20)
    batcher.submit([text(1)])
    gate.begun.wait(30)
    batcher.submit([text(19)])
    last = batcher.submit(
        [text(500)]
    )  # taken: there was room, and no request is too large for ever
    with pytest.raises(QueueFullError) as error:
        batcher.submit([text(1)])
    assert 1 <= error.value.retry_after <= 3600
    gate.opened.set()
    last.result(30)
    batcher.submit([text(1)]).result(30)


def test_a_request_that_was_given_up_is_not_computed(make):
    gate = Gate()
    batcher = make(gate)
    batcher.submit([text(1)])
    gate.begun.wait(30)
    given_up = batcher.submit([text(3, 9), text(3, 9)])
    kept = batcher.submit([text(2, 8)])
    assert given_up.cancel()
    gate.opened.set()
    kept.result(30)
    assert all(t.ids[0] != 9 for batch in gate.batches for t in batch)
    assert batcher.waiting_tokens == 0


def test_closing_finishes_what_was_taken_and_refuses_the_rest(make):
    gate = Gate()
    batcher = make(gate)
    futures = [batcher.submit([text(9, i)]) for i in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    until = time.monotonic() + 30
    with pytest.raises(ClosedError):
        while time.monotonic() < until:
            futures.append(batcher.submit([text(1)]))
    gate.opened.set()
    closing.join()
    assert all(future.done() for future in futures)
    assert not batcher.is_alive


def test_a_batch_waits_for_as_many_requests_as_the_last_had(make):
    gate = Gate()
    batcher = make(gate, max_batch_tokens=100, max_wait=20.0)
    batcher.submit([text(1)])
    gate.begun.wait(30)
    both = [batcher.submit([text(1)]) for _ in range(2)]
    gate.opened.set()
    [f.result(30) for f in both]
    one = batcher.submit([text(1)])
    time.sleep(0.05)
    assert not one.done()
    other = batcher.submit([text(1)])
    one.result(30)
    other.result(30)
    assert [len(batch) for batch in gate.batches] == [1, 2, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_fails_what_waits_and_what_comes(make):
    gate = Gate()

    def compute(texts):
        gate(texts)
        raise SystemExit("no Exception, which would fail this batch alone")

    batcher = make(compute)
    computed = batcher.submit([text(1)])
    gate.begun.wait(30)
    waiting = [batcher.submit([text(9), text(9)]) for _ in range(3)]
    gate.opened.set()
    for future in (computed, *waiting):
        with pytest.raises(ClosedError, match="computing thread has died"):
            future.result(30)
    batcher._thread.join(30)
    assert not batcher.is_alive and batcher.waiting_tokens == 0
    with pytest.raises(ClosedError, match="computing thread has died"):
        batcher.submit([text(1)])
