"""MoEMLP: a mixture of experts in place of the MLP of an encoder layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fast import ops
from moe_fast.layers.router import MoERouter
from moe_fast.layers.routing_info import RoutingInfo
from moe_fast.ops.activations import ACTIVATIONS, activate
from moe_fast.ops.checks import check_choice, check_count
from moe_fast.ops.route.modes import check_experts_per_tok, resolve_weight_mode

TARGETS = ("mlp", "intermediate", "output")
EXPERT_FORMS = ("full", "lora")
BLOCKS = ("mlp", "multi_head")
LORA_RANK = 8  # PEFT's default


class OutputBlock(NamedTuple):
    """The operations after the MLP of a BERT layer: ``LayerNorm(dropout(y) + residual)``.

    Attributes:
        residual: in the shape of the MLP's input.
        weight, bias, eps: those of the LayerNorm; weight and bias are [D].
        dropout: the probability, 0 outside of training.
    """

    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    dropout: float


class MoEMLP(nn.Module):
    """A mixture of E expert MLPs, of which each token uses K; without residual and norm.

    Args:
        hidden_size, intermediate_size: D and H.
        num_experts, num_experts_per_tok: E and K. With ``routing="dense"`` K is E.
        hidden_act: a name of :data:`moe_fast.ops.activations.ACTIVATIONS`.
        gated: ``down(act(z1) * z2)`` with ``[z1, z2] = gate_up(x)``, not ``down(act(up(x)))``.
        bias: whether the projections have biases.
        shared_bias: whether one bias is added behind the experts' weighted sum, and none in them.
            It does not grow or shrink with the weights; target "mlp" alone.
        routing, weight_mode: as in :func:`moe_fast.ops.route`.
        target: the weights that every expert has of its own: "mlp" (both projections), or one
            projection only: "intermediate" (the experts are summed before the activation) or
            "output" (the experts are summed after it, and the router reads the activated
            intermediate). The other projection is shared by all experts.
        expert_form: "full", every expert has weights of its own; or "lora", all experts share one
            projection W, and expert e has ``W + lora_alpha / lora_rank * B[e] @ A[e]``
            (:func:`moe_fast.ops.lora_mlp`). B starts at 0, so that all experts start as W.
        lora_rank, lora_alpha: for "lora" alone; by default 8, and alpha as large as the rank.

    Parameters (with transformers' names, stacked over experts; a shared projection has no dimension
    E): ``up_proj`` [E, H, D] or gated ``gate_up_proj`` [E, 2H, D] (the activated half first),
    ``down_proj`` [E, D, H], their ``_bias`` [E, H], [E, 2H], [E, D] or ``None``, the shared
    ``output_bias`` [D] or ``None``, and ``router.weight`` [E, D] ([E, H] for target "output"; none
    with enforced routing). With LoRA, projections and biases have no dimension E, and for those
    that experts adapt there are ``up_proj_A`` [E, R, D] and ``up_proj_B`` [E, H, R], and likewise
    ``down_proj_A`` and ``down_proj_B``.

    Raises:
        ValueError: for settings that do not go together, naming the argument.
    """

    output_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int = 1,
        *,
        hidden_act: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        shared_bias: bool = False,
        routing: str = "token_topk",
        weight_mode: str = "auto",
        target: str = "mlp",
        expert_form: str = "full",
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("hidden_act", hidden_act, ACTIVATIONS)
        check_choice("target", target, TARGETS)
        if shared_bias and target != "mlp":
            raise ValueError(
                "shared_bias must be False unless the experts are whole MLPs (target='mlp'); got "
                f"True with target={target!r}."
            )
        lora_rank, lora_alpha = lora_settings(expert_form, lora_rank, lora_alpha, shared_bias)
        check_count("hidden_size", hidden_size)
        check_count("intermediate_size", intermediate_size)
        check_experts_per_tok(routing, num_experts_per_tok, num_experts, "routing")
        if routing == "dense":
            num_experts_per_tok = num_experts
        chosen = resolve_weight_mode(routing, weight_mode, num_experts_per_tok, "routing")
        if chosen == "renormalize" and num_experts_per_tok == 1:
            warnings.warn(
                "weight_mode='renormalize' with num_experts_per_tok=1 is the constant 1: the task "
                "never trains the router. Use 'straight_through' (what 'auto' chooses) or "
                "'probability'.",
                stacklevel=2,
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_act = hidden_act
        self.gated = gated
        self.target = target
        self.expert_form = expert_form
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        up_rows = intermediate_size * (2 if gated else 1)
        shapes = {
            self.up_name: (up_rows, hidden_size),
            "down_proj": (hidden_size, intermediate_size),
        }
        own_bias = bias and not shared_bias
        for name, shape in shapes.items():
            stack = (num_experts,) if self.is_expert(name) else ()
            weight = torch.empty(*stack, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
            bias_value = torch.empty(*stack, shape[0], device=device, dtype=dtype)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias_value) if own_bias else None)
            if lora_rank is not None and self.is_replicated(name):
                out, width = shape
                for end, sizes in (("A", (lora_rank, width)), ("B", (out, lora_rank))):
                    value = torch.empty(num_experts, *sizes, device=device, dtype=dtype)
                    self.register_parameter(f"{name}_{end}", nn.Parameter(value))
        shared = torch.empty(hidden_size, device=device, dtype=dtype)
        self.register_parameter("output_bias", nn.Parameter(shared) if shared_bias else None)
        router_dim = intermediate_size if target == "output" else hidden_size
        self.router = MoERouter(
            router_dim, num_experts, num_experts_per_tok, routing, weight_mode, device, dtype
        )
        self.reset_parameters()

    @property
    def up_name(self) -> str:
        """Name of the up projection's parameter."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def experts_per_token(self) -> int:
        """How many experts a token visits at most."""
        return self.num_experts_per_tok

    def is_expert(self, name: str) -> bool:
        """Whether every expert has its own parameter ``name``, a weight, a bias or half a pair."""
        if self.expert_form == "lora" and not name.endswith(("_A", "_B")):
            return False
        return self.is_replicated(name)

    def is_replicated(self, name: str) -> bool:
        """Whether the experts differ in the projection that the parameter ``name`` belongs to."""
        if self.target == "mlp":
            return name.startswith((self.up_name, "down_proj"))
        return (self.target == "output") == name.startswith("down_proj")

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The names and values of the parameters that are stacked over experts ([E, ...])."""
        for name, parameter in self.named_parameters(recurse=False):
            if self.is_expert(name):
                yield name, parameter

    def reset_parameters(self) -> None:
        """Initialise every expert and the router as ``nn.Linear`` does, pairs as PEFT does."""
        for name in (self.up_name, "down_proj"):
            weight, bias = self.projection(name)
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
            if self.has_pair(name):
                a, b, _ = self.pair(name)
                nn.init.uniform_(a, -bound, bound)
                nn.init.zeros_(b)
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)
        self.router.reset_parameters()

    def projection(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the projection ``name``."""
        return getattr(self, name), getattr(self, f"{name}_bias")

    def has_pair(self, name: str) -> bool:
        """Whether experts adapt the projection ``name`` by low-rank pairs."""
        return self.expert_form == "lora" and self.is_replicated(name)

    def pair(self, name: str) -> ops.LowRank:
        """The experts' low-rank pairs for the projection ``name``."""
        assert self.lora_rank is not None and self.lora_alpha is not None
        scale = self.lora_alpha / self.lora_rank
        return ops.LowRank(getattr(self, f"{name}_A"), getattr(self, f"{name}_B"), scale)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        expert_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        routing: RoutingInfo | None = None,
        output_block: OutputBlock | None = None,
    ) -> Tensor:
        """Compute the weighted sum of each token's experts.

        Args:
            hidden_states: [B, L, D] or [T, D].
            expert_ids, token_mask, cu_seqlens: as in :func:`moe_fast.ops.route`.
            routing: the previous three in one object, instead of them.
            output_block: operations to apply to the result in the same pass
                (:func:`moe_fast.ops.expert_mlp_norm`); only for target "mlp".

        Returns:
            A tensor in the shape and dtype of ``hidden_states``. Padding gives 0 for target "mlp"
            (or the shared bias), and the output of the shared projection for the other targets.
            With ``output_block``, the output of these operations, for padding too.
        """
        if output_block is not None and self.target != "mlp":
            raise ValueError(
                f"output_block must be None with target={self.target!r}: only a mixture of whole "
                "MLPs is fused with it; got a value."
            )
        if output_block is not None and self.expert_form != "full":
            raise ValueError(
                f"output_block must be None with expert_form={self.expert_form!r}: only experts "
                "with weights of their own are fused with it; got a value."
            )
        if output_block is not None and self.output_bias is not None:
            raise ValueError(
                "output_block must be None with shared_bias=True: that bias stands between the "
                "experts and what is fused with them; got a value."
            )
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must end in hidden_size = {self.hidden_size}; "
                f"got shape {list(hidden_states.shape)}."
            )
        info = routing
        if type(info) is not RoutingInfo or not expert_ids is token_mask is cu_seqlens is None:
            info = RoutingInfo.of(
                routing, expert_ids=expert_ids, token_mask=token_mask, cu_seqlens=cu_seqlens
            )
        if self.target == "output":
            h = self._shared_linear(self.up_name, hidden_states)
            return self._mixed("down_proj", activate(h, self.hidden_act, self.gated), info)
        if self.target == "intermediate":
            z = self._mixed(self.up_name, hidden_states, info)
            return self._shared_linear("down_proj", activate(z, self.hidden_act, self.gated))
        routed, plan = self._route(hidden_states, info)
        x = hidden_states.reshape(-1, self.hidden_size)
        y = self._expert_mlp(x, routed, plan, output_block)
        if self.output_bias is not None:
            y = y + self.output_bias.to(y.dtype)
        return y.view(hidden_states.shape)

    def _mixed(self, name: str, x: Tensor, info: RoutingInfo) -> Tensor:
        """The projection ``name`` of each token's experts, weighted and summed."""
        weights, plan = self._route(x, info)
        y = self._expert_linear(name, x.reshape(-1, x.shape[-1]), weights, plan)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _shared_linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self.projection(name))

    def _expert_linear(
        self, name: str, x: Tensor, weights: Tensor, plan: ops.RoutingPlan
    ) -> Tensor:
        if self.expert_form == "lora":
            return ops.lora_linear(x, *self.projection(name), self.pair(name), weights, plan)
        return ops.expert_linear(x, *self.projection(name), weights, plan)

    def _expert_mlp(
        self, x: Tensor, weights: Tensor, plan: ops.RoutingPlan, block: OutputBlock | None
    ) -> Tensor:
        up, up_bias = self.projection(self.up_name)
        down, down_bias = self.projection("down_proj")
        form: dict[str, Any] = dict(act=self.hidden_act, gated=self.gated)
        if self.expert_form == "lora":
            pairs = self.pair(self.up_name), self.pair("down_proj")
            return ops.lora_mlp(x, up, down, up_bias, down_bias, *pairs, weights, plan, **form)
        experts = (x, up, down, up_bias, down_bias, weights, plan)
        if block is None:
            return ops.expert_mlp(*experts, **form)
        residual, weight, bias, eps, dropout = block
        after = (residual.reshape(x.shape), weight, bias)
        return ops.expert_mlp_norm(*experts, *after, eps=eps, dropout=dropout, **form)

    def _route(self, x: Tensor, info: RoutingInfo) -> tuple[Tensor, ops.RoutingPlan]:
        """Routing weights [T, K] and the plan."""
        routed = self.router(x, info)
        if info.enforced is not None:
            return routed.top_k_weights, info.enforced[1]
        return routed.top_k_weights, ops.plan(routed.top_k_index, self.num_experts)

    def extra_repr(self) -> str:
        """The settings that ``print(module)`` shows."""
        lora = f", lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"hidden_act={self.hidden_act}, gated={self.gated}, target={self.target}"
            f"{lora if self.expert_form == 'lora' else ''}"
        )


def lora_settings(
    expert_form: str, rank: int | None, alpha: float | None, shared_bias: bool = False
) -> tuple[int | None, float | None]:
    """The rank and alpha of LoRA experts, with their defaults; ``None``, ``None`` for others.

    Raises:
        ValueError, TypeError: for settings that do not go together, naming the argument.
    """
    check_choice("expert_form", expert_form, EXPERT_FORMS)
    given = [name for name, v in (("lora_rank", rank), ("lora_alpha", alpha)) if v is not None]
    if expert_form == "full":
        if given:
            raise ValueError(f"{given[0]} must be None with expert_form='full'; got a value.")
        return None, None
    if shared_bias:
        raise ValueError(
            "shared_bias must be False with expert_form='lora', whose experts share all biases."
        )
    rank = LORA_RANK if rank is None else rank
    check_count("lora_rank", rank)
    alpha = float(rank) if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha must be a positive, finite number; got {alpha!r}.")
    return rank, float(alpha)
