"""Lets the experts of small domains learn from the texts of all domains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from moe_fast.layers import MoEMLP


class ExpertPoolingCallback(TrainerCallback):
    """Adds a share of the other experts' gradients to each expert's own, more for small domains.

    An expert that sees 20 texts learns them by heart. A dense model would have learned from all
    texts. Partial pooling lies between the two: before each optimizer step, the gradient g_e of
    expert e becomes

        g_e + s_e (sum of g_j over the other experts j),  s_e = strength / (strength + n_e),

    where n_e is the number of training rows of domain e. With s_e = 1 the expert learns what the
    MLP of a dense model would learn, with s_e = 0 from the texts of its domain alone. The domain
    tokens, which replace [CLS], are pooled in the same way. The weights of the rule are those by
    which a mean of few values is shrunk towards the mean over all groups (Gelman and Hill, Data
    Analysis Using Regression and Multilevel Models, 2006, chapter 12).

    Works with mixtures whose routing is enforced, on one process or several; not where gradients
    are kept elsewhere (FSDP, DeepSpeed).

    Args:
        rows: {domain: the number of training rows}, of every domain of the model.
        strength: the number of rows at which an expert learns as much from its own texts as from
            an other's; 0 pools nothing, ``math.inf`` trains all experts alike.
        steps: pool in the first `steps` optimizer steps only; ``None``: in all.

    Raises:
        ValueError: `strength` is negative or not a number, or a number of rows is negative.
    """

    def __init__(
        self, rows: Mapping[str, int], strength: float = 300.0, steps: int | None = None
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be a number of at least 0; got {strength!r}.")
        if negative := {name: count for name, count in rows.items() if count < 0}:
            raise ValueError(f"rows must be numbers of at least 0; got {negative}.")
        self.rows = dict(rows)
        self.strength = float(strength)
        self.steps = steps

    def shares(self, domains: list[str]) -> Tensor:
        """The share s_e of each domain, [E], float32."""
        if math.isinf(self.strength):
            return torch.ones(len(domains))
        counts = torch.tensor([float(self.rows[name]) for name in domains])
        return torch.nan_to_num(self.strength / (self.strength + counts))  # 0 / 0: no pooling

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that the model has an expert per domain, and that every domain's rows are known.

        Raises:
            ValueError: it has none, or `rows` names other domains.
        """
        config = _config_of(model)
        if config is None or config.routing != "enforced":
            got = "a dense model" if config is None else f"routing={config.routing!r}"
            raise ValueError(
                "ExpertPoolingCallback needs a mixture with routing='enforced', which has an "
                f"expert per domain; got {got}."
            )
        if sorted(self.rows) != sorted(config.domains):
            raise ValueError(
                f"rows must give a number for each of the model's domains, {config.domains}; "
                f"got {sorted(self.rows)}."
            )

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Pool the gradients, after they were clipped."""
        if self.steps is not None and state.global_step >= self.steps:
            return
        config = _config_of(model)
        assert model is not None and config is not None
        shares = self.shares(config.domains)
        for module in model.modules():
            if isinstance(module, MoEMLP):
                for _, parameter in module.expert_parameters():
                    if parameter.grad is not None:
                        pool(parameter.grad, shares)
        if config.domain_token_ids:
            weight = _encoder_of(model).get_input_embeddings().weight
            if weight.grad is not None:
                rows = weight.grad[config.domain_token_ids]
                pool(rows, shares)
                weight.grad[config.domain_token_ids] = rows


def pool(gradients: Tensor, shares: Tensor) -> None:
    """Add to each expert's gradient its share of the others', in place.

    Args:
        gradients: [E, ...], floating.
        shares: [E].
    """
    weights = shares.to(gradients).reshape(-1, *[1] * (gradients.ndim - 1))
    total = gradients.sum(0, keepdim=True)
    gradients.mul_(1 - weights).addcmul_(total, weights)  # exact for shares of 0 and of 1


def _encoder_of(model: nn.Module) -> Any:
    """The mixture in a SentenceTransformer, wrapped or not; None: there is none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "routing"):
            return module
    return None


def _config_of(model: nn.Module | None) -> Any:
    encoder = None if model is None else _encoder_of(model)
    return None if encoder is None else encoder.config
