"""The attention function "moe_fast" in transformers' own dense encoders."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening

import moe_fast  # noqa: F401  registers it
from moe_fast.layers import ATTENTION
from moe_fast.layers.attention import attention_forward
from tests.models.tiny import CLS, NAMES, build, relative_error


def lively(name, **changes):
    """A dense model in float64 whose weights make attention far from uniform."""
    model = build(name, **changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


def padded(lengths, length=None, pad=0, left=False):
    """Random texts of these lengths behind [CLS], padded on one side."""
    width = length or max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        here = slice(width - n, None) if left else slice(0, n)
        ids[row, here] = torch.randint(6, 60, (n,))
        ids[row, here.start] = CLS
        mask[row, here] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_gradients(model, outputs_of):
    """Outputs, and every parameter's gradient of a random function of them."""
    model.zero_grad(set_to_none=True)  # new tensors for new gradients
    outputs = outputs_of(model)
    generator = torch.Generator().manual_seed(5)
    sum(
        (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs
    ).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [y.detach() for y in outputs], grads


def test_it_is_registered_with_its_mask_function():
    assert ATTENTION in AttentionInterface.valid_keys(AttentionInterface())
    assert ATTENTION in AttentionMaskInterface.valid_keys(AttentionMaskInterface())


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", [[9, 5, 1, 12], [7, 7], [6]])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_equals_sdpa(name, lengths, left):
    """float64: outputs at real tokens, and all gradients of a function of them."""
    model = lively(name)
    batch = padded(lengths, pad=model.config.pad_token_id, left=left)
    real = batch["attention_mask"].bool()

    def run(attention):
        model.set_attn_implementation(attention)
        return with_gradients(model, lambda m: [m(**batch).last_hidden_state[real]])

    (want,), want_grads = run("sdpa")
    (got,), got_grads = run(ATTENTION)
    assert relative_error(got, want) <= 1e-12
    assert len(got_grads) == len(want_grads) > 10
    for g, w in zip(got_grads, want_grads, strict=True):
        assert (g - w).norm() <= 1e-11 * w.norm() + 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_batch_equals_the_texts_alone(name):
    """As transformers' collator packs: [1, T], starts, positions from 0 in each text."""
    model = lively(name)
    texts = [padded([n])["input_ids"][0].tolist() for n in (9, 1, 4, 4)]
    model.set_attn_implementation("sdpa")
    want = torch.cat([model(torch.tensor([text])).last_hidden_state[0] for text in texts])
    model.set_attn_implementation(ATTENTION)
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    features = flatten([{"input_ids": text} for text in texts])
    del features["labels"]
    if "roberta" in name:  # whose positions start behind the padding's id
        features["position_ids"] += model.config.pad_token_id + 1
    got = model(**features).last_hidden_state[0]
    assert relative_error(got, want) <= 1e-12


def test_a_mask_of_pairs_of_tokens_is_taken_as_it_is():
    model = lively("bert")
    ids = torch.randint(6, 60, (2, 7))
    mask = torch.rand(2, 1, 7, 7) < 0.6
    mask |= torch.eye(7, dtype=torch.bool)
    model.set_attn_implementation("sdpa")
    want = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation(ATTENTION)
    assert relative_error(model(ids, attention_mask=mask).last_hidden_state, want) <= 1e-12


def test_padding_comes_out_zero_and_is_never_read():
    query = torch.randn(2, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    query[0, :, 3:] = float("nan")
    y, weights = attention_forward(torch.nn.Module(), query, query, query, mask)
    assert weights is None and y.shape == (2, 5, 2, 4)
    assert not y[0, 3:].any() and y.isfinite().all()


def _module(**attributes):
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("module", "key_length", "options", "message"),
    [
        (_module(is_causal=True), 3, {}, "causal attention"),
        (_module(), 4, {}, r"cross-attention .*query \[1, 2, 3, 4\], key \[1, 2, 4, 4\]"),
        (_module(), 3, {"output_attentions": True}, "output_attentions=True"),
    ],
)
def test_what_it_does_not_do_is_refused(module, key_length, options, message):
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, key_length, 4)
    with pytest.raises(ValueError, match=f"'moe_fast' is for encoders.*{message}.*'sdpa'"):
        attention_forward(module, query, key, key, None, **options)


@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.ones(2, 3, dtype=torch.bool)}])
def test_another_batch_of_keys_is_refused(options):
    query, key = torch.zeros(2, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"cross-attention .*key \[1, 2, 3, 4\]"):
        attention_forward(_module(), query, key, key, **{"attention_mask": None, **options})
