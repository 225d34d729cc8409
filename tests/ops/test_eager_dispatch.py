"""register_op: eager calls take the short way, everything else meets the registered op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_fast.ops.eager_dispatch import register_op, schema_of

from .helpers import RecordOps

calls: list[str] = []


def _scale(x: Tensor, factor: float) -> Tensor:
    calls.append("kernel")
    return x * factor


def _fake(x, factor):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.factor = inputs[1]


def _backward(ctx, grad):
    return grad * ctx.factor, None


scale = register_op(
    "moe_fast::test_scale", schema_of(_scale), _scale, _fake, _setup_context, _backward
)
scale_only = register_op("moe_fast::test_scale_only", schema_of(_scale), _scale, _fake)


def test_values_and_gradients():
    x = torch.randn(3, requires_grad=True)
    y = scale(x, 2.0)
    (grad,) = torch.autograd.grad(y, x, torch.ones(3))
    assert torch.equal(y, 2 * x) and torch.equal(grad, torch.full((3,), 2.0))
    with torch.no_grad():
        assert not scale(x, 2.0).requires_grad
    assert not scale(x.detach(), 2.0).requires_grad


def test_eager_calls_do_not_pass_the_dispatcher():
    x = torch.randn(3, requires_grad=True)
    with torch.profiler.profile() as profile:
        scale(x, 2.0).sum().backward()
    names = {event.name for event in profile.events()}
    assert "aten::mul" in names and "moe_fast::test_scale" not in names


def test_dispatch_modes_see_the_op():
    x = torch.randn(3, requires_grad=True)
    with RecordOps() as recorded:
        scale(x, 2.0).sum().backward()
        scale_only(x.detach(), 2.0)
    assert set(recorded.calls) == {"moe_fast::test_scale", "moe_fast::test_scale_only"}


def test_fake_tensors_do_not_reach_the_kernel():
    calls.clear()
    with FakeTensorMode():
        assert scale(torch.empty(3), 2.0).shape == (3,)
    assert not calls


def test_tensors_of_their_own_kind_do_not_reach_the_kernel():
    with FakeTensorMode() as mode:
        x = torch.empty(3)
    calls.clear()
    assert scale(x, 2.0).fake_mode is mode
    assert not calls


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_see_the_op():
    """vmap runs the op row by row; its parts in eager mode would meet a batched tensor."""
    x = torch.randn(2, 3)
    calls.clear()
    assert torch.equal(torch.func.vmap(lambda x: scale(x, 2.0))(x), 2 * x)
    assert calls == ["kernel"] * 2


def test_compiles_as_one_graph():
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x: scale(x, 2.0) + 1, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), 2 * x + 1)
    assert any("test_scale" in str(node.target) for node in graphs[0].graph.nodes)


def test_an_op_without_a_gradient_says_so():
    y = scale_only(torch.randn(3, requires_grad=True), 2.0)
    with pytest.raises(RuntimeError, match="test_scale_only"):
        y.sum().backward()
