"""expert_mlp: every token through the MLPs of its K experts, summed with its routing weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops

from . import oracle
from .helpers import (
    DTYPES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    assert_says,
    gradients,
    leaves,
    opcheck_calls,
    property_test,
)

F64 = torch.float64
T, K, E, D, H = 7, 2, 3, 5, 6
ACTS = ["gelu", "gelu_tanh", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"]
ACTS += ["clamped_swiglu"]
ORDER = ["x", "up_proj", "down_proj", "up_proj_bias", "down_proj_bias", "top_k_weights"]


def problem(
    *,
    num_tokens: int = T,
    k: int = K,
    num_experts: int = E,
    gated: bool = False,
    biases: str = "both",
    dtype: torch.dtype = F64,
    skip: bool = True,
) -> tuple[dict, torch.Tensor]:
    """Activations of unit scale, and ids of which some are >= E unless ``skip`` is false."""
    up = 2 * H if gated else H
    tensors = dict(
        x=torch.randn(num_tokens, D),
        up_proj=torch.randn(num_experts, up, D) / D**0.5,
        down_proj=torch.randn(num_experts, D, H) / H**0.5,
        up_proj_bias=torch.randn(num_experts, up) if biases in ("both", "up") else None,
        down_proj_bias=torch.randn(num_experts, D) if biases in ("both", "down") else None,
    )
    inputs = leaves(**{n: None if t is None else t.to(dtype) for n, t in tensors.items()})
    # Weights are float32 at least, whatever the model's dtype.
    inputs |= leaves(top_k_weights=torch.rand(num_tokens, k).to(F64 if dtype == F64 else None))
    top_k_index = torch.randint(0, num_experts + (2 if skip else 0), (num_tokens, k))
    return inputs, top_k_index


def ours(inputs: dict, top_k_index: torch.Tensor, **kwargs) -> torch.Tensor:
    plan = ops.plan(top_k_index, inputs["up_proj"].shape[0])
    return ops.expert_mlp(*(inputs[name] for name in ORDER), plan, **kwargs)


def theirs(inputs: dict, top_k_index: torch.Tensor, **kwargs) -> torch.Tensor:
    return oracle.expert_mlp(*(inputs[name] for name in ORDER), top_k_index, **kwargs)


def assert_same(inputs, top_k_index, tolerance=TOLERANCES[F64], recompute=None, **kwargs) -> None:
    """Forward and every gradient."""
    actual = ours(inputs, top_k_index, recompute=recompute, **kwargs)
    expected = theirs(inputs, top_k_index, **kwargs)
    assert actual.dtype == inputs["x"].dtype
    assert_close(actual, expected, tolerance, "y")
    upstream = torch.randn(expected.shape).to(actual.dtype)
    grads = gradients([actual], [upstream], inputs)
    assert all(grads[name].dtype == inputs[name].dtype for name in grads)
    assert_gradients_close(grads, gradients([expected], [upstream], inputs), tolerance)


# --------------------------------------------------------------------- agreement with the oracle


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("biases", ["both", "none", "up", "down"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_values_and_gradients_equal_the_oracle(act, gated, biases, recompute):
    inputs, top_k_index = problem(gated=gated, biases=biases)
    assert_same(inputs, top_k_index, act=act, gated=gated, recompute=recompute)


@pytest.mark.parametrize("gated", [False, True])
def test_clamped_swiglu_beyond_its_limits(gated):
    inputs, top_k_index = problem(gated=gated, num_tokens=20)
    inputs = leaves(**inputs | {"x": 8 * inputs["x"]})
    assert_same(inputs, top_k_index, act="clamped_swiglu", gated=gated)


@pytest.mark.parametrize("recompute", [None, "up"])
def test_halves_apart(recompute):
    """[E, 2, H, D], here of pairs of rows: the same values, and gradients of that shape."""
    inputs, top_k_index = problem(gated=True)
    pairs = inputs["up_proj"].detach().unflatten(1, (2, H)).transpose(1, 2).contiguous()
    apart = leaves(**inputs | {"up_proj": pairs.transpose(1, 2)})
    joined = inputs | {"up_proj": apart["up_proj"].flatten(1, 2)}
    settings = dict(act="clamped_swiglu", gated=True)
    actual = ours(apart, top_k_index, **settings, recompute=recompute)
    expected = theirs(joined, top_k_index, **settings)
    assert_close(actual, expected)
    upstream = torch.randn(expected.shape, dtype=F64)
    grads = gradients([actual], [upstream], apart)
    (up,) = torch.autograd.grad(expected, apart["up_proj"], upstream, retain_graph=True)
    assert_close(grads["up_proj"], up)
    assert_close(grads["x"], torch.autograd.grad(actual, apart["x"], upstream)[0])


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_computed_in_float32(given, backend):
    """As if all were cast: y in float32, gradients in the dtypes of what they belong to."""
    inputs, top_k_index = problem(gated=True, dtype=given)
    settings = dict(act="silu", gated=True)
    y = ours(inputs, top_k_index, **settings, dtype=torch.float32, backend=backend)
    expected = theirs(inputs, top_k_index, **settings)
    assert y.dtype == torch.float32
    assert_close(y, expected, TOLERANCES[torch.float32], "y")
    upstream = torch.randn(y.shape)
    grads = gradients([y], [upstream], inputs)
    assert all(grads[name].dtype == inputs[name].dtype for name in grads)
    assert_gradients_close(grads, gradients([expected], [upstream], inputs), TOLERANCES[given])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lower_precision(dtype, gated):
    inputs, top_k_index = problem(gated=gated, dtype=dtype)
    assert_same(inputs, top_k_index, TOLERANCES[dtype], gated=gated)


@property_test
@given(
    num_experts=st.sampled_from([1, 2, 3, 5, 7, 8, 16]),
    k=st.sampled_from([1, 2, 99]),
    num_tokens=st.sampled_from([0, 1, 2, 9]),
    gated=st.booleans(),
    skip=st.booleans(),
    recompute=st.sampled_from([None, "up"]),
    seed=st.integers(0, 999),
)
def test_any_shape(num_experts, k, num_tokens, gated, skip, recompute, seed):
    """Also T = 0, no more tokens than experts (so that some are empty), and the same expert
    twice for one token."""
    torch.manual_seed(seed)
    inputs, top_k_index = problem(
        num_experts=num_experts,
        k=min(k, num_experts),
        num_tokens=num_tokens,
        gated=gated,
        skip=skip,
    )
    if num_tokens:
        assert_same(inputs, top_k_index, gated=gated, recompute=recompute)
        return
    y = ours(inputs, top_k_index, gated=gated, recompute=recompute)
    assert y.shape == (0, D)
    for grad, tensor in zip(gradients([y], [y], inputs).values(), inputs.values(), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_upcycled_experts_equal_the_dense_mlp():
    """The library's first promise: copies of one MLP are that MLP, whoever is chosen."""
    up, down = torch.nn.Linear(D, H, dtype=F64), torch.nn.Linear(H, D, dtype=F64)
    x = torch.randn(40, D, dtype=F64)
    copies = [t.expand(E, *t.shape) for t in (up.weight, down.weight, up.bias, down.bias)]
    dense = down(torch.nn.functional.gelu(up(x)))
    router = torch.randn(E, D, dtype=F64)
    for k in (1, 2, E):
        routing = ops.route(x, router, k)  # weights sum to one
        plan = ops.plan(routing.top_k_index, E)
        assert_close(ops.expert_mlp(x, *copies, routing.top_k_weights, plan), dense, 1e-12)


# ------------------------------------------------------------------------------ skipped and empty


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("skipped_id", [E, E + 1, 1 << 40])
def test_skipped_tokens_give_exactly_zero_and_leak_nothing(skipped_id, recompute):
    """Rows that are skipped may hold NaN, in x, in the weights and in the upstream gradient."""
    inputs, _ = problem(skip=False)
    top_k_index = torch.randint(0, E, (T, K))
    top_k_index[[1, 4]] = skipped_id  # tokens 1 and 4 wholly,
    top_k_index[3, 0] = skipped_id  # token 3 in one of its slots
    skipped = torch.tensor([1, 4])
    results = []
    for value in (0.0, float("nan"), float("inf")):
        dirty = leaves(
            **inputs
            | dict(
                x=inputs["x"].index_fill(0, skipped, value),
                top_k_weights=inputs["top_k_weights"].masked_fill(top_k_index >= E, value),
            )
        )
        y = ours(dirty, top_k_index, recompute=recompute)
        upstream = torch.ones(T, D, dtype=F64).cumsum(1).index_fill(0, skipped, value)
        grads = gradients([y], [upstream], dirty)
        assert (y[skipped] == 0).all()
        assert (grads["x"][skipped] == 0).all()
        assert (grads["top_k_weights"][top_k_index >= E] == 0).all()
        results.append([y, *grads.values()])
    for clean, nan, inf in zip(*results, strict=True):
        assert torch.equal(clean, nan)
        assert torch.equal(clean, inf)


def test_everything_skipped():
    inputs, _ = problem()
    y = ours(inputs, torch.full((T, K), E))
    assert torch.equal(y, torch.zeros(T, D, dtype=F64))
    assert all((g == 0).all() for g in gradients([y], [y + 1], inputs).values())


@pytest.mark.parametrize("expert", range(E))
def test_all_tokens_to_one_expert_and_no_gradient_for_the_others(expert):
    inputs, _ = problem()
    top_k_index = torch.full((T, 1), expert)
    inputs["top_k_weights"] = inputs["top_k_weights"].detach()[:, :1].requires_grad_()
    assert_same(inputs, top_k_index)
    y = ours(inputs, top_k_index)
    grads = gradients([y], [torch.ones_like(y)], inputs)
    for name in ORDER[1:5]:
        others = [e for e in range(E) if e != expert]
        assert (grads[name][others] == 0).all()  # zero, not uninitialised memory
        assert grads[name][expert].any()


def test_an_empty_experts_nan_is_never_read():
    """Its parameters contribute nothing, whatever they hold."""
    inputs, _ = problem(skip=False)
    top_k_index = torch.randint(0, E - 1, (T, K))
    dirty = leaves(**{n: t.detach().clone() for n, t in inputs.items()})
    for name in ORDER[1:5]:
        dirty[name].data[E - 1] = float("nan")
    y = ours(dirty, top_k_index)
    assert torch.equal(y, ours(inputs, top_k_index))
    grads = gradients([y], [torch.ones_like(y)], dirty)
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_recompute_gives_the_same_numbers(dtype, gated):
    inputs, top_k_index = problem(dtype=dtype, gated=gated)
    results = []
    for recompute in (None, "up"):
        y = ours(inputs, top_k_index, gated=gated, recompute=recompute)
        results.append([y, *gradients([y], [torch.ones_like(y).cumsum(1)], inputs).values()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_recompute_saves_less():
    """``None`` saves x and z, ``"up"`` x alone, in rows of H: what the option is for."""
    inputs, top_k_index = problem()
    saved = {}
    for recompute in (None, "up"):
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.numel() if t.is_floating_point() else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ours(inputs, top_k_index, recompute=recompute)
        saved[recompute] = sum(sizes)
    assert 0 < saved[None] - saved["up"] <= T * K * H


# ------------------------------------------------------------------------------------ odd inputs


def test_rows_do_not_depend_on_their_order():
    inputs, top_k_index = problem(num_tokens=30)
    order = torch.randperm(30)
    shuffled = inputs | dict(x=inputs["x"][order], top_k_weights=inputs["top_k_weights"][order])
    assert_close(ours(shuffled, top_k_index[order]), ours(inputs, top_k_index)[order], 1e-14)


def test_slots_do_not_depend_on_their_order():
    inputs, top_k_index = problem(k=3)
    flipped = inputs | dict(top_k_weights=inputs["top_k_weights"].flip(1))
    assert_close(ours(flipped, top_k_index.flip(1)), ours(inputs, top_k_index), 1e-14)


def test_non_contiguous_inputs():
    inputs, top_k_index = problem()
    twisted = {
        # the same values, last dimension stored first
        n: t.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
        for n, t in inputs.items()
    }
    assert not any(t.is_contiguous() for t in twisted.values())
    assert_same(twisted, top_k_index)

    strided = {
        n: torch.stack([t.detach()] * 2, -1)[..., 0].requires_grad_() for n, t in inputs.items()
    }
    assert_same(strided, top_k_index.T.contiguous().T)

    expanded = inputs | {"x": torch.randn(1, D, dtype=F64).expand(T, D).requires_grad_()}
    assert_same(expanded, top_k_index)


@pytest.mark.parametrize("recompute", [None, "up"])
def test_expanded_upstream_gradients(recompute):
    """``y.sum().backward()`` sends one number with stride 0; a row or a column likewise."""
    inputs, top_k_index = problem()
    y, expected = ours(inputs, top_k_index, recompute=recompute), theirs(inputs, top_k_index)
    for upstream in [
        torch.ones((), dtype=F64).expand(T, D),
        torch.randn(D, dtype=F64).expand(T, D),
        torch.randn(T, 1, dtype=F64).expand(T, D),
        torch.randn(D, T, dtype=F64).T,
    ]:
        assert_gradients_close(
            gradients([y], [upstream], inputs), gradients([expected], [upstream], inputs)
        )
    y.sum().backward()
    assert_close(inputs["x"].grad, gradients([expected.sum()], [torch.ones(())], inputs)["x"])


def test_only_the_gradients_that_are_wanted():
    """Frozen experts, frozen router, frozen input: any one of the six alone."""
    inputs, top_k_index = problem()
    expected = gradients([theirs(inputs, top_k_index).sum()], [torch.ones(())], inputs)
    for name in ORDER:
        frozen = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        ours(frozen, top_k_index).sum().backward()
        assert_close(frozen[name].grad, expected[name])
        assert all(t.grad is None for n, t in frozen.items() if n != name)
    with torch.no_grad():
        assert not ours(inputs, top_k_index).requires_grad


def test_two_runs_are_bitwise_equal():
    inputs, top_k_index = problem(dtype=torch.float32, num_tokens=50)

    def once():
        y = ours(inputs, top_k_index)
        return [y, *gradients([y], [torch.ones_like(y).cumsum(0)], inputs).values()]

    assert all(torch.equal(p, q) for p, q in zip(once(), once(), strict=True))


# ------------------------------------------------------------------- autocast, autograd, compiler


@pytest.mark.parametrize("gated", [False, True])
def test_autocast(gated):
    """float32 parameters, bf16 products: a bf16 output near the truth, float32 gradients."""
    inputs, top_k_index = problem(dtype=torch.float32, gated=gated)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(inputs, top_k_index, gated=gated)
        # the layer before may have returned bf16 already
        mixed = ours(inputs | {"x": inputs["x"].bfloat16()}, top_k_index, gated=gated)
    assert y.dtype == mixed.dtype == torch.bfloat16
    expected = theirs(inputs, top_k_index, gated=gated)
    # Here the rounding of the inputs counts too: a few times 2^-9, weighed by the sums' terms.
    assert_close(y, expected, 3e-2)
    assert_close(mixed, expected, 3e-2)
    upstream = torch.randn(T, D)
    grads = gradients([y], [upstream], inputs)
    assert all(g.dtype == torch.float32 for g in grads.values())
    assert_gradients_close(grads, gradients([expected], [upstream], inputs), 5e-2)


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(gated, recompute):
    inputs, top_k_index = problem(num_tokens=4, gated=gated)
    plan = ops.plan(top_k_index, E)

    def function(*tensors):
        return ops.expert_mlp(*tensors, plan, gated=gated, recompute=recompute)

    assert torch.autograd.gradcheck(function, tuple(inputs[n] for n in ORDER))


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("biases", ["both", "none"])
def test_opcheck(biases, recompute):
    inputs, top_k_index = problem(biases=biases, gated=biases == "none")
    plan = ops.plan(top_k_index, E)

    def call():
        tensors = (inputs[n] for n in ORDER)
        y = ops.expert_mlp(*tensors, plan, gated=biases == "none", recompute=recompute)
        y.cumsum(0).sum().backward()

    opcheck_calls(call, {"expert_mlp", "expert_mlp_backward"})


def whole_layer(x, router, up, down, up_bias, down_bias, mask):
    """route, plan and expert_mlp: what MoEMLP does."""
    routing = ops.route(x, router, K, token_mask=mask)
    plan = ops.plan(routing.top_k_index, E)
    return ops.expert_mlp(x, up, down, up_bias, down_bias, routing.top_k_weights, plan)


def assert_compiles(backend: str, tolerance: float) -> None:
    torch.compiler.reset()
    compiled = torch.compile(whole_layer, fullgraph=True, backend=backend, dynamic=True)
    for num_tokens in (T, 12):
        inputs, _ = problem(num_tokens=num_tokens)
        inputs = {n: inputs[n] for n in ORDER[:-1]} | leaves(router=torch.randn(E, D, dtype=F64))
        args = [inputs[n] for n in ("x", "router", *ORDER[1:5])]
        mask = torch.rand(num_tokens) < 0.8
        expected, actual = whole_layer(*args, mask), compiled(*args, mask)
        upstream = torch.randn_like(expected)
        assert_close(actual, expected, tolerance)
        assert_gradients_close(
            gradients([actual], [upstream], inputs, retain_graph=False),
            gradients([expected], [upstream], inputs),
            tolerance,
        )


def test_compiles_as_one_graph():
    assert_compiles("aot_eager", 1e-14)


@pytest.mark.slow
def test_compiles_with_inductor():
    assert_compiles("inductor", 1e-12)


# ----------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_experts_of_transformers(gated):
    """Mixtral's gated and NemotronH's ungated experts, eager, the same stacked weights."""
    if gated:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            num_local_experts=E, hidden_size=D, intermediate_size=H, hidden_act="silu"
        )
        peer_class, up_name, act = MixtralExperts, "gate_up_proj", "silu"
    else:
        pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
        from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        config = NemotronHConfig(
            n_routed_experts=E, hidden_size=D, moe_intermediate_size=H, mlp_hidden_act="gelu"
        )
        peer_class, up_name, act = NemotronHExperts, "up_proj", "gelu"
    config._experts_implementation = "eager"
    peer = peer_class(config).double()

    inputs, top_k_index = problem(gated=gated, biases="none", skip=False)
    with torch.no_grad():
        getattr(peer, up_name).copy_(inputs["up_proj"])
        peer.down_proj.copy_(inputs["down_proj"])
    tensors = inputs | {"up_proj": getattr(peer, up_name), "down_proj": peer.down_proj}
    y = ours(tensors, top_k_index, act=act, gated=gated)
    expected = peer(tensors["x"], top_k_index, tensors["top_k_weights"])
    assert_close(y, expected)
    upstream = torch.randn_like(y)
    assert_gradients_close(
        gradients([y], [upstream], tensors), gradients([expected], [upstream], tensors)
    )


# ------------------------------------------------------------------------------------- bad input


def meta(shape: list[int]) -> torch.Tensor:
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(x=torch.randn(2, T, D)), ["x", "[2, 7, 5]", "[T, D]"]),
        (dict(x=None), ["x", "tensor", "NoneType"]),
        (dict(x=torch.randn(T, 0)), ["_proj", "0"]),
        (
            dict(
                up_proj=torch.randn(E, 0, D),
                down_proj=torch.randn(E, D, 0),
                up_proj_bias=torch.randn(E, 0),
            ),
            ["D and H", "at least 1", "5 and 0"],
        ),
        (
            dict(
                up_proj=torch.randn(0, H, D),
                down_proj=torch.randn(0, D, H),
                up_proj_bias=None,
                down_proj_bias=None,
            ),
            ["at least one expert", "E = 0"],
        ),
        (dict(plan=None), ["plan", "RoutingPlan", "NoneType"]),
        (dict(x=torch.randn(T, 4)), ["_proj", "[3, ", "4"]),
        (dict(x=torch.randn(T + 1, D)), ["top_k_weights", "[7, 2]", "8"]),
        (dict(x=torch.randn(T, D, dtype=F64)), ["up_proj", "float32", "float64"]),
        (dict(x=torch.ones(T, D, dtype=torch.int64)), ["x", "int64", "float"]),
        (dict(up_proj=torch.randn(E, H)), ["up_proj", "[3, 6]", "[E, H, D]"]),
        (dict(up_proj=torch.randn(E, H, D).bfloat16()), ["up_proj", "bfloat16", "float32"]),
        (dict(up_proj=meta([E, H, D])), ["up_proj", "meta", "cpu"]),
        (dict(down_proj=torch.randn(E, H, D)), ["down_proj", "[3, 6, 5]", "5", "[E, D, H]"]),
        (dict(down_proj=torch.randn(E + 1, D, H)), ["_proj", "[3, ", "[4, "]),
        (dict(down_proj=torch.randn(E, D, H).half()), ["down_proj", "float16", "float32"]),
        (dict(up_proj_bias=torch.randn(E, D)), ["up_proj_bias", "[3, 5]", "[3, 6]"]),
        (dict(up_proj_bias=torch.randn(E, H, dtype=F64)), ["up_proj_bias", "float64", "float32"]),
        (dict(up_proj_bias=meta([E, H])), ["up_proj_bias", "meta", "cpu"]),
        (dict(down_proj_bias=torch.randn(D)), ["down_proj_bias", "[5]", "[3, 5]"]),
        (dict(top_k_weights=torch.rand(T)), ["top_k_weights", "[7]", "[T, K]"]),
        (dict(top_k_weights=torch.rand(T, 1)), ["plan", "[7]", "[14]", "T * K"]),
        (dict(top_k_weights=torch.ones(T, K).long()), ["top_k_weights", "int64", "float32"]),
        (dict(top_k_weights=meta([T, K])), ["top_k_weights", "meta", "cpu"]),
        (dict(plan=ops.plan(torch.zeros(4, K, dtype=torch.int64), E)), ["plan", "8", "14"]),
        (
            dict(plan=ops.plan(torch.zeros(T, K, dtype=torch.int64), 4)),
            ["plan", "[4]", "[5]", "E + 1"],
        ),
        (dict(act="gelu_fast"), ["act", "gelu_fast", *ACTS]),
        (dict(recompute="down"), ["recompute", "down", "None", "up"]),
        (dict(backend="cuda"), ["backend", "cuda", "auto", "torch"]),
        (dict(gated=True, up_proj=torch.randn(E, 7, D)), ["up_proj", "[3, 7, 5]", "2H"]),
        (dict(gated=True), ["up_proj", "[3, 6, 5]", "2H", "[3, 12, 5]"]),
    ],
)
def test_bad_input(change, says):
    inputs, top_k_index = problem(dtype=torch.float32, skip=False)
    arguments = inputs | dict(plan=ops.plan(top_k_index, E)) | change
    with pytest.raises((ValueError, TypeError)) as error:
        ops.expert_mlp(**arguments)
    assert_says(error, *says)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.int64])
def test_a_dtype_narrower_than_that_of_x_is_refused(dtype):
    x, weights = torch.zeros(3, 2), torch.ones(3, 1)
    plan = ops.plan(torch.zeros(3, 1, dtype=torch.long), 1)
    up, down = torch.zeros(1, 4, 2), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="dtype must be one of torch.float64, torch.float32; got"):
        ops.expert_mlp(x, up, down, None, None, weights, plan, dtype=dtype)
