"""privacy-filter's experts in ONNX Runtime: its operator ``com.microsoft.MoE``.

``torch.onnx.export`` has no form of transformers' loop over experts: its work follows the routing.
So the operator is written down directly. What it computes is compared like every candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def why_missing() -> str | None:
    """Return what has to be installed, or ``None``."""
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    return f"{', '.join(missing)} not installed (extra bench-peers)" if missing else None


def onnx_runtime(experts: Any, scores: Tensor, k: int, x: Tensor) -> Callable[[], list[Tensor]]:
    """A call that computes the experts of x [T, D] in float32.

    Args:
        experts: transformers' module with up projections [E, D, 2 H], the gates first.
        scores: router logits [T, E]; the weights are a softmax over the best ``k``, over ``k``.
        k: the experts of a token.
        x: [T, D], of any float dtype.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        _model(experts, k), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"x": x.float().numpy(), "scores": scores.float().numpy()}

    def call() -> list[Tensor]:
        (y,) = session.run(None, inputs)
        return [torch.from_numpy(y) / k]

    return call


def _model(experts: Any, k: int) -> bytes:
    """The operator as an ONNX model; weights are [E, outputs, inputs] there, in float32."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {
        "up": _pairs(experts.gate_up_proj.mT),
        "up_bias": _pairs(experts.gate_up_proj_bias),
        "down": experts.down_proj.mT,
        "down_bias": experts.down_proj_bias,
    }
    stored = [
        numpy_helper.from_array(t.detach().float().contiguous().numpy(), name)
        for name, t in weights.items()
    ]
    node = helper.make_node(
        "MoE",
        ["x", "scores", *weights],
        ["y"],
        domain="com.microsoft",
        activation_type="swiglu",
        activation_alpha=1.702,
        activation_beta=1.0,
        swiglu_limit=7.0,
        swiglu_fusion=1,  # pairs of rows, the only form that its CPU kernel takes
        k=k,
        normalize_routing_weights=1,
    )
    dim, num_experts = experts.gate_up_proj.shape[1], experts.gate_up_proj.shape[0]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "experts",
        [
            value("x", TensorProto.FLOAT, ["T", dim]),
            value("scores", TensorProto.FLOAT, ["T", num_experts]),
        ],
        [value("y", TensorProto.FLOAT, ["T", dim])],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _pairs(halves: Tensor) -> Tensor:
    """[E, 2 H, ...] with each gate beside its other half."""
    return halves.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
