"""Padding-free forward: with attn_implementation="moe_fast" a mixture gives what it gave before."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import moe_fast
from moe_fast.layers import ATTENTION
from moe_fast.losses.routing_record import record_routing
from moe_fast.models.packing import Packing
from tests.layers.test_attention import lively, padded, with_gradients
from tests.models.tiny import CLS, NAMES, relative_error

# Several lengths, one token alone, one text, equal lengths, neighbours of equal length.
LENGTHS = [[9, 5, 1, 12], [7], [6, 6, 6], [1, 1], [3, 8, 8, 2]]
# K = 1 and 2, per token and per sentence, each kind of weight that "auto" gives.
ROUTINGS = [
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 2},
    {"routing": "sentence_topk", "num_experts_per_tok": 2},
    {"routing": "sentence_switch", "weight_mode": "probability"},
    {"routing": "dense"},
    {"routing": "enforced"},
]


def mixture(name="bert", *, experts=3, **settings):
    """In float64, with experts that differ and a router that decides clearly."""
    dense = settings.pop("dense", None) or lively(name)
    moe = moe_fast.upcycle(dense, num_experts=experts, **settings)
    with torch.no_grad():
        for mlp in moe.moe_mlps().values():
            for parameter in mlp.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return moe


def enforced_ids(moe, lengths):
    if moe.config.routing != "enforced":
        return {}
    return {"expert_ids": torch.arange(len(lengths)) % moe.config.num_experts}


def both(moe, run):
    """What ``run(moe)`` gives with padding, and packed."""
    results = []
    for attention in ("sdpa", ATTENTION):
        moe.set_attn_implementation(attention)
        results.append(run(moe))
    return results


def real_outputs(moe, batch, **inputs):
    """Everything that a forward returns, of real tokens."""
    real = batch["attention_mask"].bool()
    out = moe(**batch, **inputs, output_router_logits=True, output_hidden_states=True)
    tensors = [out.last_hidden_state[real], *(h[real] for h in out.hidden_states)]
    tensors += [x[real.flatten()] for x in out.router_logits or ()]
    if getattr(out, "pooler_output", None) is not None:
        tensors.append(out.pooler_output)
    return out, tensors


# Every model with every routing; each of the other lengths with every model, and every routing.
CASES = [
    (name, settings, lengths)
    for i, name in enumerate(NAMES)
    for j, settings in enumerate(ROUTINGS)
    for k, lengths in enumerate(LENGTHS)
    if k == 0 or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("name", "settings", "lengths"), CASES, ids=str)
def test_equals_the_padded_model(name, settings, lengths):
    """float64: all outputs to 1e-12, all parameters' gradients to 1e-11 (sums over more terms)."""
    moe = mixture(name, **settings)
    batch = padded(lengths, pad=moe.config.pad_token_id)
    inputs = enforced_ids(moe, lengths)

    def run(model):
        outputs = []

        def tensors(m):
            outputs.append(m(**batch, **inputs, output_router_logits=True))
            return real_outputs(m, batch, **inputs)[1]

        return outputs, *with_gradients(model, tensors)

    (padded_out, want, want_grads), (packed_out, got, got_grads) = both(moe, run)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= 1e-12
    assert len(got_grads) == len(want_grads) > 10
    for g, w in zip(got_grads, want_grads, strict=True):
        assert (g - w).norm() <= 1e-11 * w.norm() + 1e-12
    for g, w in zip(packed_out[0].tokens_per_expert, padded_out[0].tokens_per_expert, strict=True):
        assert torch.equal(g, w)
    assert [x.shape for x in packed_out[0].router_logits or ()] == [
        x.shape for x in padded_out[0].router_logits or ()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    moe = mixture(name, num_experts_per_tok=2).float()
    batch = padded([9, 5, 1, 12], pad=moe.config.pad_token_id)
    with torch.no_grad():
        want, got = both(moe, lambda m: real_outputs(m, batch)[1])
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_autocast(name):
    """Against float64 on the same weights, packed is as near as padded: no further loss."""
    moe = mixture(name, routing="enforced").bfloat16()
    exact = mixture(name, routing="enforced").double()
    exact.load_state_dict(moe.state_dict())
    lengths = [9, 5, 1, 12]
    batch = padded(lengths, pad=moe.config.pad_token_id)
    ids = enforced_ids(moe, lengths)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = exact(**batch, **ids).last_hidden_state[real]
        errors = both(
            moe, lambda m: relative_error(m(**batch, **ids).last_hidden_state[real].double(), want)
        )
        assert errors[1] <= 1.5 * errors[0] + 1e-2, errors
        moe.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = both(
                moe,
                lambda m: relative_error(m(**batch, **ids).last_hidden_state[real].double(), want),
            )
    assert mixed[1] <= 1.5 * mixed[0] + 1e-2, mixed


@pytest.mark.parametrize("name", NAMES)
def test_only_real_tokens_travel(name):
    moe = mixture(name)
    moe.set_attn_implementation(ATTENTION)
    seen = []
    moe.encoder_layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    out = moe(**padded([9, 5, 1, 12], pad=moe.config.pad_token_id))
    assert seen == [(1, 27, 32)]
    assert out.last_hidden_state.shape == (4, 12, 32)
    assert not out.last_hidden_state[1, 5:].any(), "padding comes out as zeros"


@pytest.mark.parametrize("name", NAMES)
def test_a_text_alone_equals_the_text_in_a_batch(name):
    moe = mixture(name, routing="sentence_topk", num_experts_per_tok=2)
    moe.set_attn_implementation(ATTENTION)
    batch = padded([9, 5, 1, 12], pad=moe.config.pad_token_id)
    with torch.no_grad():
        together = moe(**batch)
        for row, n in enumerate([9, 5, 1, 12]):
            alone = moe(input_ids=batch["input_ids"][row : row + 1, :n])
            got = together.last_hidden_state[row, :n]
            assert relative_error(got, alone.last_hidden_state[0]) <= 1e-12
            if "pooler_output" in together:
                assert relative_error(together.pooler_output[row], alone.pooler_output[0]) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_left(name):
    """Positions are those of the padded model; the pooler reads the first token that is real."""
    moe = mixture(name)
    batch = padded([9, 5, 1, 12], pad=moe.config.pad_token_id, left=True)
    with torch.no_grad():
        (_, want), (out, got) = both(moe, lambda m: real_outputs(m, batch))
    for g, w in list(zip(got, want, strict=True))[:5]:  # not the pooler: it read padding
        assert relative_error(g, w) <= 1e-12
    if "pooler_output" in out:
        first = out.last_hidden_state[torch.arange(4), torch.tensor([3, 7, 11, 0])]
        assert torch.equal(out.pooler_output, moe.pooler(first[:, None]))


def test_holes_in_a_text():
    """Masked tokens inside a text are left out; with windows over positions that is refused."""
    batch = padded([9, 6])
    batch["attention_mask"][0, 3:5] = 0
    with torch.no_grad():
        want, got = both(mixture("bert"), lambda m: real_outputs(m, batch)[1])
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= 1e-12
    modern = mixture("modernbert")
    modern.set_attn_implementation(ATTENTION)
    with pytest.raises(ValueError, match="no padding inside a text .* row 0"):
        modern(**batch)


def test_every_input_is_packed():
    """Token types, positions of the caller's own, embeddings in place of ids, ids per token."""
    moe = mixture("bert", routing="enforced")
    batch = padded([4, 7, 2])
    shape = batch["input_ids"].shape
    extra = {
        "token_type_ids": torch.randint(0, 2, shape),
        "position_ids": torch.randint(0, 40, shape),
        "expert_ids": torch.randint(0, 3, shape),
    }
    embeds = torch.randn(*shape, 32, dtype=torch.float64)
    real = batch["attention_mask"].bool()
    for inputs in (batch, {"attention_mask": batch["attention_mask"], "inputs_embeds": embeds}):
        with torch.no_grad():
            want, got = both(moe, lambda m, i=inputs: m(**i, **extra).last_hidden_state[real])
        assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_embeddings_without_ids_or_mask(name):
    moe = mixture(name)
    embeds = torch.randn(3, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        want, got = both(moe, lambda m: m(inputs_embeds=embeds).last_hidden_state)
    assert relative_error(got, want) <= 1e-12


def test_roberta_skips_positions_of_tokens_that_look_like_padding():
    moe = mixture("roberta")
    batch = padded([9, 5], pad=1)
    batch["input_ids"][0, 3] = 1
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want, got = both(moe, lambda m: m(**batch).last_hidden_state[real])
    assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("routing", ["enforced", "token_topk"])
@pytest.mark.parametrize("name", NAMES)
def test_domain_tokens(name, routing):
    moe = mixture(name, routing=routing, domains=["a", "b", "c"], cls_token_id=CLS)
    with torch.no_grad():
        for parameter in moe.get_input_embeddings().parameters():
            parameter[60:] += torch.randn(3, 32, dtype=torch.float64)
        batch = padded([4, 7, 2], pad=moe.config.pad_token_id)
        real = batch["attention_mask"].bool()
        domain_ids = torch.tensor([2, 0, 1])
        want, got = both(moe, lambda m: m(**batch, domain_ids=domain_ids).last_hidden_state[real])
        assert relative_error(got, want) <= 1e-12
        other = moe(**batch, domain="a").last_hidden_state[real]
    assert relative_error(other, got) > 1e-2


@pytest.mark.parametrize(
    "settings", [{"layers": [1]}, {"target": "intermediate"}, {"target": "output"}]
)
def test_some_layers_and_some_projections(settings):
    moe = mixture("bert", num_experts_per_tok=2, **settings)
    batch = padded([4, 7, 2])
    with torch.no_grad():
        want, got = both(moe, lambda m: real_outputs(m, batch)[1])
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) <= 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("by_call", [False, True], ids=["chosen for the model", "for the call"])
def test_gradient_checkpointing(by_call, reentrant):
    """The layers' second forward comes when the choice of a call is over."""
    moe = mixture("bert").train()
    moe.set_attn_implementation("sdpa" if by_call else ATTENTION)
    batch = padded([4, 7, 2])
    real = batch["attention_mask"].bool()

    def gradients():
        options = {"packed": True} if by_call else {}
        return with_gradients(moe, lambda m: [m(**batch, **options).last_hidden_state[real]])[1]

    plain = gradients()
    moe.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for g, w in zip(gradients(), plain, strict=True):
        # that of a key's bias is 0 but for rounding
        assert torch.allclose(g, w, 1e-10, 1e-12) if by_call else torch.equal(g, w)


def test_dropout_in_training_is_seeded_and_ends_in_evaluation():
    dense = lively("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    moe = mixture(dense=dense).train()
    moe.set_attn_implementation(ATTENTION)
    batch = padded([4, 7, 2])
    torch.manual_seed(1)
    first = moe(**batch).last_hidden_state
    second = moe(**batch).last_hidden_state
    torch.manual_seed(1)
    again = moe(**batch).last_hidden_state
    assert torch.equal(first, again) and not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters() if p.grad is not None)
    moe.eval()
    assert torch.equal(moe(**batch).last_hidden_state, moe(**batch).last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_compiled_forward_and_gradients(name):
    torch._dynamo.reset()
    moe = mixture(dense=lively(name, num_hidden_layers=1), num_experts_per_tok=2)
    moe.set_attn_implementation(ATTENTION)
    compiled = torch.compile(moe, backend="aot_eager")
    for lengths in ([4, 7, 2], [3, 3]):
        batch = padded(lengths, pad=moe.config.pad_token_id)
        want, want_grads = with_gradients(moe, lambda m, b=batch: [m(**b).last_hidden_state])
        got, got_grads = with_gradients(moe, lambda _, b=batch: [compiled(**b).last_hidden_state])
        assert relative_error(got[0], want[0]) <= 1e-12
        for g, w in zip(got_grads, want_grads, strict=True):
            assert (g - w).norm() <= 1e-11 * w.norm() + 1e-12


def test_router_losses_see_the_same_sentences():
    """The record that RouterLoss reads: packed, it is the padded one's real tokens, in order."""
    moe = mixture("bert")
    batch = padded([4, 7, 2])

    def record(m):
        with record_routing(m) as recorder:
            m(**batch)
        return recorder.result()

    want, got = both(moe, record)
    real = want.token_mask
    assert got.token_mask.all() and got.num_sentences == want.num_sentences == 3
    assert relative_error(got.logits, want.logits[:, real]) <= 1e-12
    assert torch.equal(got.sentence_ids, want.sentence_ids[real])


# --- batches that the caller packed --------------------------------------------------------------


def flattened(batch, lengths):
    """As transformers' and sentence-transformers' collators pack; positions left to the model."""
    texts = [ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    flatten = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=False, return_seq_idx=True
    )
    features = flatten([{"input_ids": text} for text in texts])
    del features["labels"]
    return features


@pytest.mark.parametrize("settings", ROUTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_packed_by_the_caller(name, settings):
    moe, lengths = mixture(name, **settings), [9, 5, 1, 12]
    batch = padded(lengths, pad=moe.config.pad_token_id)
    moe.set_attn_implementation(ATTENTION)
    inputs = enforced_ids(moe, lengths)
    with torch.no_grad():
        want = moe(**batch, **inputs)
        got = moe(**flattened(batch, lengths), **inputs)
    real = batch["attention_mask"].bool()
    assert got.last_hidden_state.shape == (1, 27, 32)
    assert relative_error(got.last_hidden_state[0], want.last_hidden_state[real]) <= 1e-12
    if "pooler_output" in want:
        assert relative_error(got.pooler_output, want.pooler_output) <= 1e-12


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean", "lasttoken"])
def test_sentence_transformers_pools_a_packed_batch(mode):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    moe, lengths = mixture("bert"), [9, 5, 1, 12]
    batch = padded(lengths)
    moe.set_attn_implementation(ATTENTION)
    pooling = modules.Pooling(32, pooling_mode=mode)
    results = []
    for features in (batch, flattened(batch, lengths)):
        with torch.no_grad():
            features["token_embeddings"] = moe(**features).last_hidden_state
        results.append(pooling(dict(features))["sentence_embedding"])
    assert relative_error(results[1], results[0]) <= 1e-12


def test_domain_tokens_and_ids_per_token_of_a_packed_batch():
    moe = mixture("bert", routing="enforced", domains=["a", "b", "c"], cls_token_id=CLS)
    moe.set_attn_implementation(ATTENTION)
    lengths = [4, 7, 2]
    batch, domain_ids = padded(lengths), torch.tensor([2, 0, 1])
    real = batch["attention_mask"].bool()
    packed = flattened(batch, lengths)
    with torch.no_grad():
        want = moe(**batch, domain_ids=domain_ids).last_hidden_state[real]
        assert relative_error(moe(**packed, domain_ids=domain_ids)[0][0], want) <= 1e-12
        ids = torch.randint(0, 3, batch["input_ids"].shape)
        want = moe(**batch, expert_ids=ids).last_hidden_state[real]
        assert relative_error(moe(**packed, expert_ids=ids[real][None])[0][0], want) <= 1e-12


def _expect(message, error=ValueError):
    return pytest.raises(error, match=message)


def test_bad_packed_batches_are_refused():
    moe, lengths = mixture("bert"), [4, 7, 2]
    packed = flattened(padded(lengths), lengths)
    with _expect("needs attn_implementation='moe_fast' .*with 'sdpa' .* see each other"):
        moe(**packed)
    moe.set_attn_implementation(ATTENTION)
    with _expect("attention_mask must be None beside cu_seq_lens_q"):
        moe(**packed, attention_mask=torch.ones(1, 13))
    with _expect(r"must have shape \[1, T\]; got \[13, 1\]"):
        moe(**{**packed, "input_ids": packed["input_ids"].T})
    with _expect(r"cu_seqlens must rise from 0 to T = 13; got \[0, 4, 12\]"):
        moe(**{**packed, "cu_seq_lens_q": torch.tensor([0, 4, 12])})
    with _expect(r"no empty sequence; got \[0, 4, 4, 13\]"):
        moe(**{**packed, "cu_seq_lens_q": torch.tensor([0, 4, 4, 13])})
    with _expect(r"cu_seq_lens_q must hold 0 and T at least; got \[0\]"):
        moe(**{**packed, "cu_seq_lens_q": torch.tensor([0])})
    with _expect("max_length_q must be at least the longest sequence's 7; got 6"):
        moe(**{**packed, "max_length_q": 6})
    with _expect("cu_seq_lens_q must have dtype int64, int32", TypeError):
        moe(**{**packed, "cu_seq_lens_q": torch.tensor([0.0, 13.0])})
    with _expect("at most 40 tokens per text .*; got 41"):
        starts = torch.tensor([0, 41])
        moe(torch.full((1, 41), 7), cu_seq_lens_q=starts)
    long = torch.full((1, 60), 7)  # more tokens than positions, but no text is long
    assert moe(long, cu_seq_lens_q=torch.tensor([0, 30, 60]))[0].shape == (1, 60, 32)


def test_bad_padded_batches_are_refused():
    moe = mixture("bert", routing="enforced")
    moe.set_attn_implementation(ATTENTION)
    batch = padded([4, 7, 2])
    ids = {"expert_ids": torch.tensor([0, 1, 2])}
    with _expect("attention_mask must mark at least one token as real; got all zeros"):
        moe(batch["input_ids"], torch.zeros(3, 7), **ids)
    with _expect("output_attentions must be False with attn_implementation='moe_fast'"):
        moe(**batch, **ids, output_attentions=True)
    moe.set_attn_implementation("eager")
    moe.config.output_attentions = True
    moe.set_attn_implementation(ATTENTION)
    with _expect("output_attentions must be False with attn_implementation='moe_fast'"):
        moe(**batch, **ids)
    moe.config.output_attentions = False
    with _expect(r"expert_ids must have shape \[B\] or \[B, L\] = \[3, 7\]; got \[3, 6\]"):
        moe(**batch, expert_ids=torch.zeros(3, 6, dtype=torch.long))
    with _expect(r"expert_ids must lie in .*\[0, 3\); got 3"):
        moe(**batch, expert_ids=torch.tensor([0, 3, 1]))


def test_a_text_without_real_tokens_comes_out_zero():
    moe = mixture("bert", routing="sentence_topk")
    moe.set_attn_implementation(ATTENTION)
    batch = padded([4, 7, 2])
    with torch.no_grad():
        want = moe(**batch)
        batch["attention_mask"][1] = 0
        got = moe(**batch)
    assert not got.last_hidden_state[1].any() and got.pooler_output.isfinite().all()
    for row in (0, 2):
        assert relative_error(got.last_hidden_state[row], want.last_hidden_state[row]) <= 1e-12


def test_a_mask_of_pairs_of_tokens_is_not_packed():
    moe = mixture("bert")
    ids = torch.randint(6, 60, (2, 7))
    mask = (torch.rand(2, 1, 7, 7) < 0.6) | torch.eye(7, dtype=torch.bool)
    with torch.no_grad():
        want, got = both(moe, lambda m: m(ids, attention_mask=mask).last_hidden_state)
    assert relative_error(got, want) <= 1e-12


def test_the_longest_text_is_not_the_width_of_the_batch():
    """Kernels make room for ``max_length``: padding that all texts have costs nothing."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert Packing.of_padded(mask, mask, contiguous=False).max_length == 2


@pytest.mark.parametrize(("routing", "plans"), [("enforced", 1), ("token_topk", 3)])
def test_an_enforced_plan_is_made_once_for_all_layers(routing, plans, monkeypatch):
    moe = mixture("bert", routing=routing)
    made, plan = [], moe_fast.ops.plan
    monkeypatch.setattr(
        moe_fast.ops, "plan", lambda *a, **k: made.append(plan(*a, **k)) or made[-1]
    )
    both(moe, lambda moe: moe(**padded([4, 7, 2]), **enforced_ids(moe, [4, 7, 2])))
    assert len(moe.moe_mlps()) == 3 and len(made) == 2 * plans


def test_packing_a_worked_example():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1]])
    packing = Packing.of_padded(mask, mask, contiguous=True)
    assert packing.cu_seqlens.tolist() == [0, 2, 3, 6] and packing.max_length == 3
    assert packing.first_columns.tolist() == [0, 1, 0]
    values = torch.arange(9.0).view(3, 3)
    packed = packing.pack(values)
    assert packed.tolist() == [[0.0, 1.0, 4.0, 6.0, 7.0, 8.0]]
    assert packing.unpack(packed).tolist() == (values * mask).tolist()
    assert packing.pack(torch.arange(3)[None]).tolist() == [[0, 1, 1, 0, 1, 2]]
