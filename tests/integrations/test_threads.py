"""Many threads on one MoESentenceTransformer: each gets what it would get alone."""

import copy
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import moe_fast
from moe_fast.data import mine_hard_negatives
from moe_fast.evaluation import evaluate_pairs
from moe_fast.evaluation.expert_usage import expert_usage

DOMAINS = ["a", "b", "c"]
THREADS = 8


def _mixture(dense, **settings):
    """Three experts that differ."""
    model = moe_fast.upcycle(dense, num_experts=3, domains=DOMAINS, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mlp in model.transformers_model.moe_mlps().values():
            mlp.down_proj += 0.2 * torch.randn(mlp.down_proj.shape, generator=generator)
    return model


@pytest.fixture
def enforced(dense):
    return _mixture(dense, routing="enforced")


def _calls(number):
    """Texts and options of ``number`` calls of every kind; some texts must be cut."""
    draw = random.Random(0)
    calls = []
    for _ in range(number):
        words = [draw.choice([1, 3, 9, 30, 50]) for _ in range(draw.randint(1, 3))]
        texts = [" ".join(f"w{draw.randrange(54)}" for _ in range(count)) for count in words]
        one = draw.random() < 0.5
        options = {
            "domain": draw.choice(DOMAINS) if one else [draw.choice(DOMAINS) for _ in texts],
            "packed": draw.random() < 0.5,
            "truncate": True,
            "batch_size": draw.choice([1, 32, 32]),
            "prompt_name": draw.choice([None, "query", "document"]),
            "show_progress_bar": False,
        }
        calls.append((texts, options))
    return calls


def _shared_state(model):
    """All that a call might change and another might see."""
    encoder = model.transformers_model
    tokenizer = model.tokenizer
    return {
        "configuration": encoder.config.to_dict() | {"_": encoder.config._attn_implementation},
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "tokenizer's settings": {k: repr(v) for k, v in vars(tokenizer).items() if k[0] != "_"},
        "attributes": {
            name: copy.deepcopy(value)
            for name, value in vars(model).items()
            if isinstance(value, (bool, int, str, list, dict, type(None))) and name[0] != "_"
        },
        "module_kwargs": copy.deepcopy(model.module_kwargs),
        "modes": [module.training for module in model.modules()],
        "levels": [logging.getLogger(name).level for name in (None, "moe_fast", "transformers")],
        "threads": torch.get_num_threads(),
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def _check_unchanged(before, model):
    after = _shared_state(model)
    weights = before.pop("weights"), after.pop("weights")
    assert after == before
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def _serve(model, calls, number):
    """What a server of eight threads answers to so many calls, and what one thread does."""
    expected = [model.encode(texts, **options) for texts, options in calls]
    model = copy.deepcopy(model)  # as it came: nothing was warmed up by the calls above
    before = _shared_state(model)
    together = threading.Barrier(THREADS)

    def worker(first):
        together.wait()
        mine = [i % len(calls) for i in range(first, number, THREADS)]
        return [(i, model.encode(calls[i][0], **calls[i][1])) for i in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        for answers in pool.map(worker, range(THREADS)):
            for i, got in answers:
                np.testing.assert_allclose(got, expected[i], rtol=0, atol=1e-6)
    _check_unchanged(before, model)


@pytest.mark.parametrize("routing", ["enforced", "token_topk"])
def test_a_server_of_eight_threads(dense, routing):
    model = _mixture(dense, routing=routing).eval()
    _serve(model, _calls(40), 120)


@pytest.mark.slow
def test_two_thousand_calls_of_eight_threads(enforced):
    _serve(enforced.eval(), _calls(101), 2_000)


def test_calls_that_overlap_choose_attention_and_truncation_for_themselves(enforced, caplog):
    """One call starts and ends while another one is between its first and its second layer."""
    texts = ["w1 w2", "w3 " * 50]
    want = {
        packed: enforced.encode(texts, domain="a", truncate=True, packed=packed)
        for packed in (True, False)
    }
    inside, other_done, shapes = threading.Event(), threading.Event(), []

    def wait_for_the_other(_module, args):
        shapes.append(args[0].shape[0])
        if threading.current_thread().name == "outer":
            inside.set()
            assert other_done.wait(30)

    layer = enforced.transformers_model.encoder_layers[1]
    layer.register_forward_pre_hook(wait_for_the_other)
    caplog.clear()
    got = {}

    def outer():
        got["outer"] = enforced.encode(texts, domain="a", truncate=True)

    caplog.set_level(logging.WARNING)
    thread = threading.Thread(target=outer, name="outer")
    thread.start()
    assert inside.wait(30)
    with pytest.raises(ValueError, match="text 0 has 52"):
        enforced.encode(["w3 " * 50], domain="b", truncate=False)
    got["inner"] = enforced.encode(texts[1:], domain="a", truncate=True, packed=False)
    other_done.set()
    thread.join()
    np.testing.assert_allclose(got["outer"], want[True], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["inner"], want[False][1:], rtol=0, atol=1e-6)
    assert shapes == [1, 1], "two texts packed into one row, and one padded text"
    counts = [r.getMessage().split(" texts")[0] for r in caplog.records]
    assert sorted(counts) == ["1 of 1", "1 of 2"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_everything_as_it_was(enforced, fails):
    enforced.eval()
    enforced.tokenizer(["w1"], truncation=True, max_length=7, padding="max_length")
    before = _shared_state(enforced)
    if fails:
        with pytest.raises(ValueError, match="too long"):
            enforced.encode(["w1 " * 90], domain="a")
        enforced.transformers_model.encoder_layers[1].forward = None
        with pytest.raises(TypeError):
            enforced.encode(["w1"], domain=["a"])
        del enforced.transformers_model.encoder_layers[1].forward
    else:
        enforced.encode(["w1 " * 90, "w2"], domain=["b", "a"], truncate=True, prompt="w3 ")
        enforced.encode_query("w2", domain="a")
    _check_unchanged(before, enforced)


def test_evaluation_mining_and_a_card_beside_encode(enforced, tmp_path):
    """They share a model with threads that encode, and get what they get alone."""
    enforced.eval()
    calls = _calls(16)
    pairs = {
        "a": [f"w{i} w{i + 1}" for i in range(12)],
        "b": [f"w{i + 1} w{i + 2}" for i in range(12)],
        "label": [i % 2 for i in range(12)],
        "domain": [DOMAINS[i % 3] for i in range(12)],
    }
    texts = [f"w{i} " * (i + 1) for i in range(9)]
    rows = [
        {"query": f"w{i} w1", "pos": [f"w{i} w2 w3"], "domain": DOMAINS[i % 3]} for i in range(9)
    ]

    def jobs(folder):
        return [
            lambda: evaluate_pairs(enforced, pairs).scores,
            lambda: expert_usage(enforced, texts, DOMAINS * 3, pass_domain=True).tolist(),
            lambda: mine_hard_negatives(rows, enforced).rows,
            lambda: enforced.save_pretrained(str(folder)),
            lambda: [enforced.encode(t, **o).tolist() for t, o in calls],
            lambda: [enforced.encode(t, **o).tolist() for t, o in reversed(calls)],
        ]

    want = [job() for job in jobs(tmp_path / "alone")]
    before = _shared_state(enforced)
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(lambda job: job(), jobs(tmp_path / "together")))
    assert got[:3] == want[:3] and got[2]
    for i in (4, 5):
        for mine, alone in zip(got[i], want[i], strict=True):
            np.testing.assert_allclose(mine, alone, rtol=0, atol=1e-6)
    assert "domain='a'" in (tmp_path / "together" / "README.md").read_text(encoding="utf-8")
    _check_unchanged(before, enforced)


def test_the_stock_class_on_our_encoder_is_as_before(enforced, tmp_path):
    enforced.save_pretrained(str(tmp_path))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    shapes = []
    layer = stock.transformers_model.encoder_layers[1]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    texts = ["w1 w2 w3", "w4"]
    got = stock.encode(texts, domain="b")
    assert shapes == [(2, 5, 32)], "it pads"
    np.testing.assert_allclose(got, enforced.encode(texts, domain="b"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["encode", "encode_query", "encode_document"])
def test_a_batch_is_the_one_that_sentence_transformers_makes(enforced, task):
    """Whatever the prompt: the same ids, masks and lengths of prompts, token for token."""
    texts = ["w1 w2 w3", "w4", "w5 " * 60, ""]
    prompts = {"encode": None, "encode_query": "query", "encode_document": "document"}
    seen = []
    enforced[0].register_forward_pre_hook(lambda _, args: seen.append(dict(args[0])))
    getattr(enforced, task)(texts, domain="a", truncate=True, packed=False)
    prompt = enforced.prompts.get(prompts[task])
    by_length = sorted(texts, key=len, reverse=True)
    want = enforced.preprocess(by_length, prompt=prompt)
    assert seen[0].keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(seen[0][name], value), name
        else:
            assert seen[0][name] == value, name
