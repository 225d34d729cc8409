"""What a person can get wrong, and the message that says so before any work starts.

Each case goes through the public surface; the modules' own tests look closer.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2Model

import moe_fast
from tests.models.tiny import build, save_sentence_transformer

IDS = torch.tensor([[4, 7, 9], [4, 8, 6]])
DOMAINS = ["a", "b", "c"]


def _learned(**settings):
    return moe_fast.upcycle(build("bert"), **{"num_experts": 3, **settings})


def _enforced(**settings):
    return _learned(routing="enforced", **settings)


def _with_domains():
    return _enforced(domains=DOMAINS, cls_token_id=4)


def _nan_router():
    model = _learned()
    with torch.no_grad():
        model.moe_mlps()[0].router.weight[0, 0] = torch.nan
    return model


def _mixed_dtypes():
    model = _enforced()
    model.moe_mlps()[1].double()
    return model


def _sentence_transformer(folder: Path):
    """A mixture over three domains, saved and loaded by the stock class, and the mixture itself."""
    st = pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    dense = save_sentence_transformer(folder)
    model = moe_fast.upcycle(dense, num_experts=3, routing="enforced", domains=DOMAINS)
    model.save_pretrained(str(folder / "moe"))
    return st.SentenceTransformer(str(folder / "moe"), device="cpu"), model


def _saved(folder: Path, **changes):
    """A saved mixture whose configuration file was changed."""
    _learned().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


CASES = {
    "more experts per token than experts": (
        lambda _: _learned(num_experts_per_tok=4),
        r"num_experts_per_tok must lie in 1 .. num_experts = 3; got 4",
    ),
    "expert id too large": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0, 3])),
        r"expert_ids must lie in \[0, num_experts\) = \[0, 3\); got 3",
    ),
    "expert id negative": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0, -1])),
        r"expert_ids must lie in \[0, num_experts\) = \[0, 3\); got -1",
    ),
    "expert ids of the wrong length": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0, 1, 2])),
        r"expert_ids must have shape \[2, 3\] .*or \[2\] .*; got \[3\]",
    ),
    "expert ids of the wrong dtype": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0.0, 1.0])),
        r"expert_ids must have dtype int64, int32; got float32",
    ),
    "enforced routing without ids": (
        lambda _: _with_domains()(IDS),
        r"needs expert_ids or a domain \(known: a, b, c\); got neither",
    ),
    "both domain and expert_ids": (
        lambda _: _with_domains()(IDS, domain="a", expert_ids=torch.tensor([0, 1])),
        r"give domain or expert_ids, not both; got domain='a'",
    ),
    "unknown domain": (
        lambda _: _with_domains()(IDS, domain="law"),
        r"one of the model's domains \('a', 'b', 'c'\); got 'law'",
    ),
    "NaN in router logits": (
        lambda _: _nan_router()(IDS),
        r"router logits must not be NaN or infinite; got \[nan, .*\] for token 0",
    ),
    "unsupported architecture": (
        lambda _: moe_fast.upcycle(
            GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2)), num_experts=2
        ),
        r"one of BertModel, RobertaModel, XLMRobertaModel, ModernBertModel.*; got GPT2Model",
    ),
    "mixed dtypes": (
        lambda _: _mixed_dtypes()(IDS, expert_ids=torch.tensor([0, 1])),
        r"up_proj must have the dtype of x, torch.float32 .*; got torch.float64",
    ),
    "mixed devices": (
        lambda _: _enforced()(IDS, expert_ids=torch.zeros(2, dtype=torch.long, device="meta")),
        r"expert_ids must be on the device of x, cpu; got meta",
    ),
    "ids longer than the model's positions": (
        lambda _: _learned()(torch.full((1, 41), 7)),
        r"input_ids must hold at most 40 tokens per text .*; got 41",
    ),
    "a stock SentenceTransformer given a list of domains": (
        lambda folder: _sentence_transformer(folder)[0].encode(["w1", "w2"], domain=["a", "b"]),
        r"domain must be one name for the whole batch, a str; got list.*MoESentenceTransformer",
    ),
    "texts longer than the model allows": (
        lambda folder: _sentence_transformer(folder)[1].encode(["w1 " * 40], domain="a"),
        r"max_seq_length = 32 tokens each; text 0 has 42 .* Pass truncate=True",
    ),
    "checkpoint of another architecture": (
        lambda folder: moe_fast.models.MoERobertaModel.from_pretrained(_saved(folder)),
        r"MoERobertaConfig reads checkpoints with model_type 'moe_roberta'; got 'moe_bert'",
    ),
    "checkpoint of a newer version": (
        lambda folder: AutoModel.from_pretrained(_saved(folder, moe_fast_version="7.1.0")),
        r"written by moe_fast 7.1.0, newer than this .*pip install 'moe-fast>=7.1.0'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_names_the_argument_what_was_given_and_what_is_allowed(case, tmp_path):
    do, message = CASES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        do(tmp_path)


def test_an_empty_batch_works():
    empty = torch.zeros(0, 3, dtype=torch.long)
    assert _learned()(empty).last_hidden_state.shape == (0, 3, 32)
    ids = torch.zeros(0, dtype=torch.long)
    assert _enforced()(empty, expert_ids=ids).last_hidden_state.shape == (0, 3, 32)
