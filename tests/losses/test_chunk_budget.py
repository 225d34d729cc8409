"""The size of a chunk: measured, said, kept; and a word where a given one is slow."""

from __future__ import annotations

import logging

import pytest
import torch
from cached_checks import TOKENS, make_batch, make_model
from toy_encoder import BagEncoder, column

from moe_fast.layers import MoERouter
from moe_fast.losses import CachedLoss, InfoNCELoss, chunk_budget
from moe_fast.losses.chunk_budget import (
    ChunkProbe,
    choose_tokens_per_chunk,
    free_bytes,
    warn_if_slow,
)
from moe_fast.losses.text_chunks import text_lengths

CPU = torch.device("cpu")


class Probe:
    """A machine of which the answers are known: a fixed cost per chunk, and per token."""

    device = CPU

    def __init__(self, start: float, per_token: float = 1e-6, tokens: int = 10**6) -> None:
        self.start, self.per_token, self.number = start, per_token, tokens
        self.asked: list[int] = []

    def tokens(self) -> int:
        return self.number

    def seconds_per_token(self, num_tokens: int) -> float:
        self.asked.append(num_tokens)
        return self.start / num_tokens + self.per_token

    def bytes_per_token(self, num_tokens: int) -> float:
        return 1000.0


@pytest.mark.parametrize(
    ("start", "free", "tokens", "expected"),
    [
        (0.0, 10**12, 10**6, 512),  # nothing is gained by more
        (1e-3, 10**12, 10**6, 16_384),  # 1 + 1000/n microseconds: within 5 % of the best measured
        (1e-3, 4_200_000, 10**6, 2048),  # half of it are 2100 tokens
        (1e-3, 10**12, 1500, 2048),  # one chunk for all
        (1e-3, 600_000, 10**6, 300),  # less than the smallest that is timed
    ],
)
def test_the_smallest_that_is_all_but_the_fastest(
    monkeypatch, caplog, start, free, tokens, expected
):
    monkeypatch.setattr(chunk_budget, "free_bytes", lambda device: free)
    with caplog.at_level(logging.WARNING):
        assert choose_tokens_per_chunk(Probe(start, tokens=tokens)) == expected
    assert f"tokens_per_chunk = {expected}, chosen by measuring" in caplog.text


def test_a_slow_choice_is_said_and_a_good_one_is_not(caplog):
    warn_if_slow(Probe(1e-3), 8192)
    assert not caplog.records
    warn_if_slow(Probe(1e-3), 64)
    assert "tokens_per_chunk=64 is slow: 16.6 microseconds per token, against 4.9" in caplog.text


def test_nothing_is_measured_where_measuring_would_be_the_work():
    probe = Probe(1e-3, tokens=1000)
    warn_if_slow(probe, 64)
    assert probe.asked == []


def probe_of(model, columns) -> ChunkProbe:
    lengths = [text_lengths(column) for column in columns]
    encode = InfoNCELoss(model).embed_columns
    return ChunkProbe(model, lambda features: encode([features])[0], columns, lengths, CPU)


def test_what_a_forward_keeps():
    """A bag of words keeps its mask and its tokens' vectors for the backward pass, and no more."""

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(7))

        def forward(self, features):
            x = features["input_ids"].float()[..., None] * self.weight  # keeps the ids, as floats
            return {"sentence_embedding": x.square().sum(1)}  # keeps x

    columns = [column(*[[3] * 10] * 50), column([1], [2])]
    probe = probe_of(Square(), columns)
    assert probe.tokens() == 500
    assert probe.bytes_per_token(100) == 4 + 7 * 4


def test_measuring_leaves_no_trace():
    model = make_model("k2", dropout=0.2)
    columns = make_batch(model)
    counted = []
    for module in model.modules():
        if isinstance(module, MoERouter):
            module.register_forward_hook(lambda m, i, o: counted.append(m.training))
    state = torch.get_rng_state()
    probe = probe_of(model, columns)
    assert probe.seconds_per_token(100) > 0
    assert probe.bytes_per_token(100) > 100
    assert torch.equal(torch.get_rng_state(), state)
    assert counted and not any(counted)  # ExpertUsageCallback counts routers that train
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_first_batch_in_training_chooses_and_the_choice_is_kept(caplog):
    model = make_model("k1")
    columns = make_batch(model)
    cached = CachedLoss(InfoNCELoss(model))
    assert cached.tokens_per_chunk is None
    with torch.no_grad():
        cached(columns)
    assert cached.tokens_per_chunk is None
    cached(columns).backward()
    chosen = cached.tokens_per_chunk
    assert chosen >= chunk_budget.SMALLEST
    assert caplog.text.count("chosen by measuring") == 1
    cached(make_batch(model, rows=40)).backward()
    assert cached.tokens_per_chunk == chosen
    assert cached.get_config_dict() == {"loss": "InfoNCELoss", "tokens_per_chunk": chosen}
    restored = CachedLoss(InfoNCELoss(model))
    restored.load_state_dict(cached.state_dict())
    restored(columns).backward()
    assert restored.tokens_per_chunk == chosen
    assert caplog.text.count("chosen by measuring") == 1  # a restored choice is not made again


def test_a_given_size_is_put_to_the_test_once(monkeypatch):
    asked = []
    monkeypatch.setattr("moe_fast.losses.cached.warn_if_slow", lambda p, size: asked.append(size))
    model = make_model("dense")
    cached = CachedLoss(InfoNCELoss(model), tokens_per_chunk=TOKENS)
    for _ in range(3):
        cached(make_batch(model)).backward()
    assert asked == [TOKENS]
    assert "chosen_tokens_per_chunk" not in cached.state_dict()


def test_nothing_is_measured_where_other_processes_would_wait(monkeypatch):
    monkeypatch.setattr("moe_fast.losses.cached.forwards_together", lambda model: True)
    monkeypatch.setattr(ChunkProbe, "seconds_per_token", None)
    columns = [column([1] * 5, [2]), column([3], [4])]
    with pytest.raises(ValueError, match="tokens_per_chunk must be given for a fully sharded"):
        CachedLoss(InfoNCELoss(BagEncoder()))(columns)
    CachedLoss(InfoNCELoss(BagEncoder()), tokens_per_chunk=1)(columns).backward()


def test_a_text_longer_than_a_chunk_is_said_once(caplog):
    cached = CachedLoss(InfoNCELoss(BagEncoder()), tokens_per_chunk=3)
    for _ in range(2):
        cached([column([1] * 5, [2]), column([3], [4])]).backward()
    assert caplog.text.count("a text has 5 tokens, more than tokens_per_chunk=3") == 1


def test_free_memory_is_a_number_on_linux():
    free = free_bytes(CPU)
    assert free is None or 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None
