"""Tokens per second: real tokens only, of all columns and processes."""

from __future__ import annotations

import time

import torch

from moe_fast.training.throughput import Throughput, count_tokens


def test_real_tokens_of_every_column():
    inputs = {
        "anchor_input_ids": torch.ones(2, 5),
        "anchor_attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        "positive_attention_mask": torch.tensor([[0, 1]]),
        "packed_cu_seq_lens_q": torch.tensor([0, 3, 9], dtype=torch.int32),
        "packed_cu_seq_lens_k": torch.tensor([0, 3, 9], dtype=torch.int32),
        "label": None,
    }
    assert int(count_tokens(inputs)) == 7 + 1 + 9


def test_over_steps_and_processes():
    throughput = Throughput()
    inputs = {"a_attention_mask": torch.ones(4, 25)}
    for _ in range(2):
        with throughput.timing(inputs):
            time.sleep(0.01)
    seen = []

    def gather(own):
        seen.extend(own)
        return [*own, (300, 1000.0)]  # another process, which took longer

    assert throughput.pop(gather) == {"tokens_per_second": 0.5}
    ((tokens, seconds),) = seen
    assert tokens == 200 and seconds >= 0.02
    assert throughput.pop() == {}  # starts afresh; without a token nothing is said
