"""route: which experts each token visits, and with which weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops

from . import oracle
from .helpers import (
    DTYPES,
    assert_close,
    assert_gradients_close,
    gradients,
    leaves,
    opcheck_calls,
    property_test,
)

F64 = torch.float64
MODES = ["token_topk", "sentence_topk", "sentence_switch", "enforced", "dense"]
WEIGHT_MODES = ["renormalize", "probability", "straight_through", "one", "auto"]
E, D = 4, 5

# Every learned mode with every weight mode, K = 1, 2 and E where the mode has a K.
LEARNED = [
    *((mode, w, k) for mode in MODES[:2] for w in WEIGHT_MODES for k in (1, 2, E)),
    *(("sentence_switch", w, 1) for w in WEIGHT_MODES),
    ("dense", "auto", E),
]
# How a batch arrives: loose tokens, packed sentences or padded sentences, with a mask or without.
LAYOUTS = ["tokens", "masked tokens", "packed", "masked packed", "padded", "masked padded"]


def batch(layout: str, dtype: torch.dtype = F64) -> tuple[torch.Tensor, dict]:
    """x of 12 tokens, and the arguments that belong to its layout."""
    x, extra = torch.randn(3, 4, D, dtype=dtype), {}
    if "masked" in layout:  # padding on the right, padding on the left, a hole
        mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
        extra["token_mask"] = mask if "padded" in layout else mask.flatten()
    if "packed" in layout:
        extra["cu_seqlens"] = torch.tensor([0, 2, 7, 12], dtype=torch.int32)
    return (x if "padded" in layout else x.flatten(0, 1)), extra


def layouts(mode: str) -> list[str]:
    return [la for la in LAYOUTS if "sentence" not in mode or "tokens" not in la]


def assert_same_route(ours: ops.Routing, theirs: oracle.OracleRouting, tolerance=1e-10) -> None:
    assert ours.top_k_index.dtype == ours.tokens_per_expert.dtype == torch.int64
    assert torch.equal(ours.top_k_index, theirs.top_k_index)
    assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    assert_close(ours.top_k_weights, theirs.top_k_weights, tolerance, "top_k_weights")
    if theirs.router_logits is None:
        assert ours.router_logits is None
    else:
        assert_close(ours.router_logits, theirs.router_logits, tolerance, "router_logits")


# --------------------------------------------------------------------- agreement with the oracle


@pytest.mark.parametrize(("mode", "weight_mode", "k"), LEARNED)
def test_values_and_gradients_equal_the_oracle(mode, weight_mode, k):
    for layout in layouts(mode):
        x, extra = batch(layout)
        inputs = leaves(x=x, router_weight=torch.randn(E, D, dtype=F64))
        kwargs = dict(num_experts_per_tok=k, mode=mode, weight_mode=weight_mode, **extra)
        ours, theirs = ops.route(**inputs, **kwargs), oracle.route(**inputs, **kwargs)
        assert_same_route(ours, theirs)

        # The task's gradient comes through the weights, the router losses' through the logits.
        to_weights = torch.randn_like(theirs.top_k_weights)
        to_logits = torch.randn_like(theirs.router_logits)
        for upstream in [(to_weights, 0 * to_logits), (0 * to_weights, to_logits)]:
            expected = gradients([theirs.top_k_weights, theirs.router_logits], upstream, inputs)
            actual = gradients([ours.top_k_weights, ours.router_logits], upstream, inputs)
            if is_constant(weight_mode, k) and not upstream[1].any():
                expected = {name: torch.zeros_like(g) for name, g in expected.items()}
                # exp(z) / exp(z) is differentiated to a difference of equals: zero up to rounding
                actual = {name: torch.where(g.abs() < 1e-14, 0, g) for name, g in actual.items()}
            assert_gradients_close(actual, expected)


def is_constant(weight_mode: str, k: int) -> bool:
    """Whether the weights are 1 whatever the router says: the task then never trains it."""
    return weight_mode == "one" or (weight_mode == "renormalize" and k == 1)


@pytest.mark.parametrize(
    ("layout", "expert_ids"),
    [
        ("padded", [2, 0, 2]),  # one per sentence
        ("masked padded", [2, 0, 2]),
        ("packed", [2, 0, 2]),
        ("masked packed", [2, 0, 2]),
        ("padded", [[2, 0, 1, 1], [0, 0, 0, 3], [3, 2, 1, 0]]),  # one per token
        ("masked padded", [[2, 0, 9, -1], [-100, 0, 0, 3], [3, 4, 1, 0]]),  # padding's are ignored
        ("tokens", [2, 0, 1, 1, 0, 0, 0, 3, 3, 2, 1, 0]),
        ("masked tokens", [2, 0, 9, -1, -100, 0, 0, 3, 3, 4, 1, 0]),
    ],
)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_enforced(layout, expert_ids, ids_dtype):
    x, extra = batch(layout)
    kwargs = dict(
        mode="enforced",
        num_experts=E,
        expert_ids=torch.tensor(expert_ids, dtype=ids_dtype),
        **extra,
    )
    ours = ops.route(x, None, 1, **kwargs)
    assert_same_route(ours, oracle.route(x, None, 1, **kwargs))
    assert ours.top_k_weights.dtype == F64
    assert ours.router_logits is None
    real = ours.top_k_index < E
    assert torch.equal(ours.top_k_weights, real.to(F64))  # exactly 1, and exactly 0 for padding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["token_topk", "sentence_topk", "dense"])
def test_arithmetic_is_float32_in_lower_precision(mode, dtype):
    """The router's weight has the model's dtype, its arithmetic has not: even from bf16 inputs
    logits and weights are as exact as float32 makes them, not 4e-3."""
    x, extra = batch("masked padded", dtype)
    inputs = leaves(x=x, router_weight=torch.randn(E, D, dtype=dtype))
    ours = ops.route(**inputs, num_experts_per_tok=2, mode=mode, **extra)
    theirs = oracle.route(**inputs, num_experts_per_tok=2, mode=mode, **extra)
    assert ours.top_k_weights.dtype == ours.router_logits.dtype == torch.float32
    assert_same_route(ours, theirs, 2e-6)  # a few roundings of 6e-8

    upstream = [torch.randn_like(ours.top_k_weights), torch.randn_like(ours.router_logits)]
    actual = gradients([ours.top_k_weights, ours.router_logits], upstream, inputs)
    expected = gradients([theirs.top_k_weights, theirs.router_logits], upstream, inputs)
    assert actual["x"].dtype == actual["router_weight"].dtype == dtype
    # The one rounding that is left: the gradient to the inputs' dtype (oracle's included).
    assert_gradients_close(actual, expected, max(5e-6, 2 * torch.finfo(dtype).eps))


# ------------------------------------------------------------------------------ choosing experts


@property_test
@given(
    num_experts=st.sampled_from([1, 2, 3, 5, 7, 8, 16]),
    k=st.sampled_from([1, 2, 99]),
    num_tokens=st.sampled_from([0, 1, 2, 7]),
    seed=st.integers(0, 999),
)
def test_equal_logits_go_to_the_lower_expert_id(num_experts, k, num_tokens, seed):
    """Small integers: exact in any order of summation, and tied all the time."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (num_tokens, 3), generator=g).float()
    w = torch.randint(-1, 2, (num_experts, 3), generator=g).float()
    k = min(k, num_experts)
    assert_same_route(ops.route(x, w, k), oracle.route(x, w, k), 1e-6)
    if num_tokens in (1, 2):  # sentence means of 1 or 2 tokens are exact too
        kwargs = dict(mode="sentence_topk", cu_seqlens=torch.tensor([0, num_tokens]))
        assert_same_route(ops.route(x, w, k, **kwargs), oracle.route(x, w, k, **kwargs), 1e-6)


@pytest.mark.parametrize("num_experts", [1, 2, 5, 16, 64, 257])
@pytest.mark.parametrize("dtype", [*DTYPES, F64])
def test_all_logits_equal(num_experts, dtype):
    k = min(3, num_experts)
    routing = ops.route(torch.randn(9, D).to(dtype), torch.zeros(num_experts, D, dtype=dtype), k)
    assert routing.top_k_index.tolist() == [list(range(k))] * 9


def test_choice_is_made_on_logits_because_probabilities_underflow():
    x = torch.tensor([[1.0]])
    w = torch.tensor([[-3000.0], [-1000.0], [0.0], [-2000.0]])
    routing = ops.route(x, w, 3)
    assert routing.top_k_index.tolist() == [[2, 1, 3]]  # by probability: 2, then ties at 0
    assert routing.top_k_weights.tolist() == [[1.0, 0.0, 0.0]]


def test_large_logits_do_not_overflow():
    x, w = torch.tensor([[1e4]]), torch.tensor([[1.0], [2.0], [-3.0]])
    for weight_mode in WEIGHT_MODES:
        inputs = leaves(x=x, router_weight=w)
        routing = ops.route(**inputs, num_experts_per_tok=2, weight_mode=weight_mode)
        grads = gradients([routing.top_k_weights], [torch.randn(1, 2)], inputs)
        assert routing.top_k_weights.isfinite().all()
        assert all(g.isfinite().all() for g in grads.values()), weight_mode


def test_slots_are_in_descending_order_of_logits():
    routing = ops.route(torch.randn(50, D), torch.randn(8, D), 8)
    chosen = routing.router_logits.gather(1, routing.top_k_index)
    assert (chosen[:, :-1] >= chosen[:, 1:]).all()
    assert torch.equal(routing.top_k_index.sort(dim=1).values, torch.arange(8).expand(50, 8))


def test_dense_visits_all_experts_in_order_whatever_k_says():
    x, w = torch.randn(6, D, dtype=F64), torch.randn(E, D, dtype=F64)
    for k in (1, 2, E):
        routing = ops.route(x, w, k, mode="dense")
        assert torch.equal(routing.top_k_index, torch.arange(E).expand(6, E))
        assert_close(routing.top_k_weights, (x @ w.T).softmax(-1))


def test_sentence_modes_give_a_sentence_one_route():
    x, extra = batch("masked padded")
    w = torch.randn(E, D, dtype=F64)
    mask = extra["token_mask"]
    for mode, k in [("sentence_topk", 2), ("sentence_switch", 1)]:
        routing = ops.route(x, w, k, mode=mode, **extra)
        index = routing.top_k_index.reshape(3, 4, k)
        for b in range(3):
            assert (index[b][mask[b]] == index[b][mask[b]][0]).all()
            assert (index[b][~mask[b]] == E).all()
        # ... while the logits stay each token's own, for the router losses.
        assert_close(routing.router_logits, (mask[..., None] * (x @ w.T)).flatten(0, 1))


def test_packed_and_padded_sentences_route_alike():
    x, extra = batch("masked padded")
    mask = extra["token_mask"]
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    w = torch.randn(E, D, dtype=F64)
    for mode, k in [("token_topk", 2), ("sentence_topk", 2), ("sentence_switch", 1)]:
        padded = ops.route(x, w, k, mode=mode, **extra)
        packed = ops.route(x[mask], w, k, mode=mode, cu_seqlens=cu_seqlens)
        real = mask.flatten()
        assert torch.equal(padded.top_k_index[real], packed.top_k_index)
        assert_close(padded.top_k_weights[real], packed.top_k_weights)
        assert torch.equal(padded.tokens_per_expert, packed.tokens_per_expert)


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("mode", ["token_topk", "sentence_topk"])
def test_what_the_weight_modes_mean(mode, k):
    x, w = torch.randn(3, 4, D), torch.randn(E, D)
    weights = {
        weight_mode: ops.route(x, w, k, mode=mode, weight_mode=weight_mode).top_k_weights
        for weight_mode in WEIGHT_MODES
    }
    assert_close(weights["renormalize"].sum(1), torch.ones(12), 1e-6)
    assert (weights["probability"].sum(1) <= 1 + 1e-6).all()
    assert torch.equal(weights["straight_through"], torch.ones(12, k))  # exactly
    assert torch.equal(weights["one"], torch.ones(12, k))
    auto = "straight_through" if k == 1 else "renormalize"
    assert torch.equal(weights["auto"], weights[auto])
    if k == E:
        assert_close(weights["renormalize"], weights["probability"], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_straight_through_is_exactly_one_with_the_gradient_of_log_p(dtype):
    """Where p underflows ``p / p.detach()`` would be 0 / 0; log p has a gradient all the same."""
    x = torch.tensor([[1.0]], dtype=dtype)
    w = torch.tensor([[0.0], [-0.5], [-5000.0]], dtype=dtype, requires_grad=True)
    routing = ops.route(x, w, 3, weight_mode="straight_through")
    assert routing.top_k_weights.tolist() == [[1.0, 1.0, 1.0]]
    p = w.detach()[:, 0].softmax(0)
    for k in range(3):
        (grad,) = torch.autograd.grad(routing.top_k_weights[0, k], w, retain_graph=True)
        expected = torch.eye(3, dtype=dtype)[k] - p  # d log p_k / d logits
        assert_close(grad[:, 0], expected, 1e-6)


@pytest.mark.parametrize(("mode", "weight_mode", "k"), LEARNED)
def test_the_contrastive_loss_trains_the_router(mode, weight_mode, k):
    """In every learned mode but ``one``, and but ``renormalize`` at K = 1, whose weight is 1."""
    x = torch.randn(4, 3, D, dtype=F64)
    w = torch.randn(E, D, dtype=F64, requires_grad=True)
    routing = ops.route(x, w, k, mode=mode, weight_mode=weight_mode)
    y = ops.expert_mlp(
        x.flatten(0, 1),
        torch.randn(E, 6, D, dtype=F64),
        torch.randn(E, D, 6, dtype=F64),
        None,
        None,
        routing.top_k_weights,
        ops.plan(routing.top_k_index, E),
    )
    # With the residual of the layer: cosine alone is blind to a factor on the whole sentence.
    a, b = (x + y.reshape(x.shape)).mean(1).reshape(2, 2, D)
    loss = ops.info_nce(a, b, scale=5.0)
    largest = gradients([loss], [torch.ones(())], {"w": w})["w"].abs().max()
    assert largest < 1e-14 if is_constant(weight_mode, k) else largest > 1e-3


# ------------------------------------------------------------------------- padding and odd inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_may_hold_anything(mode, poison):
    x, extra = batch("masked padded")
    mask = extra["token_mask"]
    kwargs = dict(num_experts_per_tok=1 if mode in ("sentence_switch", "enforced") else 2)
    if mode == "enforced":
        kwargs |= dict(expert_ids=torch.tensor([1, 0, 3]), num_experts=E)
    results = []
    for value in (0.0, poison):
        inputs = leaves(
            x=x.masked_fill(~mask[..., None], value),
            router_weight=None if mode == "enforced" else torch.ones(E, D, dtype=F64).cumsum(0),
        )
        routing = ops.route(**inputs, mode=mode, **kwargs, **extra)
        outputs = [o for o in (routing.top_k_weights, routing.router_logits) if o is not None]
        # Garbage in the upstream gradient of padding is no concern of the real tokens either.
        upstream = [
            torch.ones_like(o).masked_fill(~mask.reshape(-1, 1), value).cumsum(1) for o in outputs
        ]
        grads = gradients(outputs, upstream, inputs)
        results.append((routing.top_k_index, *outputs, *grads.values()))
        assert "x" not in grads or (grads["x"][~mask] == 0).all()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, D), (0, 3, D), (2, 0, D)])
def test_empty_batch(mode, shape):
    k = 1 if mode in ("sentence_switch", "enforced") else 2
    inputs = leaves(
        x=torch.zeros(shape), router_weight=None if mode == "enforced" else torch.randn(E, D)
    )
    extra = {}
    if mode == "enforced":
        ids = torch.zeros(shape[0], dtype=torch.int64)
        extra = dict(expert_ids=ids, num_experts=E)
    elif len(shape) == 2 and "sentence" in mode:
        extra = dict(cu_seqlens=torch.tensor([0]))
    routing = ops.route(**inputs, num_experts_per_tok=k, mode=mode, **extra)
    slots = E if mode == "dense" else k
    assert routing.top_k_index.shape == routing.top_k_weights.shape == (0, slots)
    assert routing.tokens_per_expert.tolist() == [0] * E
    if mode != "enforced":
        assert routing.router_logits.shape == (0, E)
        outputs = [routing.top_k_weights, routing.router_logits]
        grads = gradients(outputs, outputs, inputs)
        assert grads["x"].shape == shape
        assert torch.equal(grads["router_weight"], torch.zeros(E, D))


def test_sentences_without_tokens():
    """Two packed sentences of length 0, and a padded one that is all padding."""
    w = torch.randn(E, D, dtype=F64)
    x = torch.randn(5, D, dtype=F64)
    kwargs = dict(mode="sentence_topk", cu_seqlens=torch.tensor([0, 0, 3, 3, 5]))
    assert_same_route(ops.route(x, w, 2, **kwargs), oracle.route(x, w, 2, **kwargs))

    inputs = leaves(x=torch.randn(2, 3, D, dtype=F64), router_weight=w)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    kwargs = dict(num_experts_per_tok=2, mode="sentence_topk", token_mask=mask)
    ours, theirs = ops.route(**inputs, **kwargs), oracle.route(**inputs, **kwargs)
    assert_same_route(ours, theirs)
    upstream = [torch.randn(6, 2, dtype=F64)]
    assert_gradients_close(
        gradients([ours.top_k_weights], upstream, inputs),
        gradients([theirs.top_k_weights], upstream, inputs),
    )


@property_test
@given(
    num_experts=st.sampled_from([1, 2, 3, 5, 7, 8, 16]),
    k=st.sampled_from([1, 2, 99]),
    num_tokens=st.sampled_from([0, 1, 3, 8]),
    mode=st.sampled_from(["token_topk", "sentence_topk", "dense"]),
    weight_mode=st.sampled_from(WEIGHT_MODES),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(num_experts, k, num_tokens, mode, weight_mode, masked, seed):
    torch.manual_seed(seed)
    cut = int(torch.randint(0, num_tokens + 1, ()))
    kwargs = dict(
        num_experts_per_tok=min(k, num_experts),
        mode=mode,
        weight_mode="auto" if mode == "dense" else weight_mode,
        cu_seqlens=torch.tensor([0, cut, num_tokens]),
        token_mask=torch.rand(num_tokens) < 0.7 if masked else None,
    )
    inputs = leaves(
        x=torch.randn(num_tokens, 3, dtype=F64),
        router_weight=torch.randn(num_experts, 3, dtype=F64),
    )
    ours, theirs = ops.route(**inputs, **kwargs), oracle.route(**inputs, **kwargs)
    assert_same_route(ours, theirs)
    assert int(ours.tokens_per_expert.sum()) == int((ours.top_k_index < num_experts).sum())


def test_rows_route_independently_of_their_order():
    x, w = torch.randn(40, D, dtype=F64), torch.randn(E, D, dtype=F64)
    order = torch.randperm(40)
    routing, shuffled = ops.route(x, w, 2), ops.route(x[order], w, 2)
    assert torch.equal(routing.top_k_index[order], shuffled.top_k_index)
    assert_close(routing.top_k_weights[order], shuffled.top_k_weights)


def test_non_contiguous_inputs_and_expanded_gradients():
    w = torch.randn(D, 2 * E, dtype=F64).T[::2]  # transposed and strided
    for x in [
        torch.randn(D, 12, dtype=F64).T,
        torch.randn(12, 2 * D, dtype=F64)[:, ::2],
        torch.randn(1, D, dtype=F64).expand(12, D),
        torch.randn(4, 3, D, dtype=F64).transpose(0, 1),
    ]:
        inputs = {"x": x.requires_grad_(), "router_weight": w.requires_grad_()}
        ours = ops.route(**inputs, num_experts_per_tok=2)
        theirs = oracle.route(**inputs, num_experts_per_tok=2)
        assert_same_route(ours, theirs)
        # sum() sends back one number expanded with stride 0. (All weights of a token sum to 1,
        # so it is their first column's sum that has a gradient.)
        first = [
            torch.autograd.grad(
                r.top_k_weights[:, 0].sum() + r.router_logits.sum(), list(inputs.values())
            )
            for r in (ours, theirs)
        ]
        for actual, expected in zip(*first, strict=True):
            assert_close(actual, expected)


def test_two_runs_are_bitwise_equal():
    x, extra = batch("masked padded", torch.float32)
    w = torch.randn(E, D)

    def once():
        inputs = leaves(x=x, router_weight=w)
        r = ops.route(**inputs, num_experts_per_tok=2, mode="sentence_topk", **extra)
        upstream = [torch.ones_like(r.top_k_weights).cumsum(1), torch.ones_like(r.router_logits)]
        grads = gradients([r.top_k_weights, r.router_logits], upstream, inputs)
        return [r.top_k_index, r.top_k_weights, r.router_logits, *grads.values()]

    assert all(torch.equal(p, q) for p, q in zip(once(), once(), strict=True))


def test_inputs_are_left_alone():
    x, extra = batch("masked padded")
    w = torch.randn(E, D, dtype=F64)
    before = x.clone(), w.clone(), extra["token_mask"].clone()
    ops.route(x, w, 2, **extra)
    assert all(torch.equal(p, q) for p, q in zip(before, (x, w, extra["token_mask"]), strict=True))


# ------------------------------------------------------------------- autocast, autograd, compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_autocast_does_not_touch_the_router(dtype):
    x, w = torch.randn(12, D).to(dtype), torch.randn(E, D).to(dtype)

    def once(autocast):
        inputs = leaves(x=x, router_weight=w)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            r = ops.route(**inputs, num_experts_per_tok=2)
        upstream = [torch.ones_like(r.top_k_weights).cumsum(1), torch.ones_like(r.router_logits)]
        grads = gradients([r.top_k_weights, r.router_logits], upstream, inputs)
        return [r.top_k_index, r.top_k_weights, r.router_logits, *grads.values()]

    for inside, outside in zip(once(True), once(False), strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


def test_autocast_may_mix_a_bf16_input_with_a_float32_weight():
    """A linear layer before us returned bf16; the parameters under autocast are float32."""
    x, w = torch.randn(12, D).bfloat16(), torch.randn(E, D)
    with torch.autocast("cpu", torch.bfloat16):
        routing = ops.route(x, w, 2)
    assert_same_route(routing, oracle.route(x, w, 2), 2e-6)


# Straight-through is constant by design, its gradient is not: finite differences see nothing.
STRAIGHT = [case for case in LEARNED if case[1] == "straight_through" or case[1:] == ("auto", 1)]


@pytest.mark.parametrize(
    ("mode", "weight_mode", "k"), [case for case in LEARNED if case not in STRAIGHT]
)
def test_gradcheck(mode, weight_mode, k):
    x, extra = batch("masked padded")
    w = torch.randn(E, D, dtype=F64)

    def function(x, w):
        r = ops.route(x, w, k, mode=mode, weight_mode=weight_mode, **extra)
        return tuple(o for o in (r.top_k_weights, r.router_logits) if o.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(leaves(x=x, w=w).values()), fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    x, extra = batch("masked padded")

    def call():
        if mode == "enforced":
            ids = torch.tensor([1, 0, 3])
            ops.route(x, None, 1, mode=mode, expert_ids=ids, num_experts=E, **extra)
            return
        inputs = leaves(x=x, router_weight=torch.randn(E, D, dtype=F64))
        k = 1 if mode == "sentence_switch" else 2
        r = ops.route(**inputs, num_experts_per_tok=k, mode=mode, **extra)
        (r.top_k_weights.cumsum(0).sum() + r.router_logits.sum()).backward()

    expected = {"route_enforced"} if mode == "enforced" else {"route", "route_backward"}
    opcheck_calls(call, expected)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_as_one_graph(mode):
    torch.compiler.reset()
    k = 1 if mode in ("sentence_switch", "enforced") else 2

    def function(x, w, ids, mask):
        if mode == "enforced":
            kwargs = dict(expert_ids=ids, num_experts=E)
            r = ops.route(x, None, k, mode=mode, token_mask=mask, **kwargs)
            return r.top_k_index, r.top_k_weights * x.sum(), r.tokens_per_expert
        r = ops.route(x, w, k, mode=mode, token_mask=mask)
        return r.top_k_index, r.top_k_weights, r.tokens_per_expert, r.router_logits

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, extra = batch("masked padded")
    w, ids, mask = torch.randn(E, D, dtype=F64), torch.tensor([1, 0, 3]), extra["token_mask"]
    results = []
    for run in (function, compiled):
        inputs = leaves(x=x, w=w)
        outputs = run(inputs["x"], inputs["w"], ids, mask)
        floating = [o for o in outputs if o.is_floating_point()]
        upstream = [torch.ones_like(o).cumsum(1) for o in floating]
        grads = gradients(floating, upstream, inputs, retain_graph=False)
        results.append([*outputs, *grads.values()])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
