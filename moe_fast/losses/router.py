"""Router losses, added to any loss of a mixture-of-experts encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.base import Columns, check_weight
from moe_fast.losses.features import encoder_config
from moe_fast.losses.functional import (
    domain_expert_joint,
    expert_supervision,
    load_balance,
    mutual_information,
    z_loss,
)
from moe_fast.losses.functional.router import Reduce, check_ids, one_process
from moe_fast.losses.global_sum import global_sum
from moe_fast.losses.routing_record import RoutingRecord, hook_routers, record_routing
from moe_fast.ops.checks import check_count


class RouterLoss(nn.Module):
    """A loss plus what its encoder's routers are to learn beside it.

    With one coefficient each, summed over MoE layers and taken over the real tokens of all text
    columns (see :mod:`moe_fast.losses.functional` for the mathematics):

        total = loss + load_balance * (E sum_e f_e P_e) + z_loss * mean(logsumexp^2)
                - mutual_information * I(domain; expert) + expert_supervision * cross entropy

    ``expert_supervision`` averages the logits over layers before it; domain i is expert i's. In
    training under ``torch.distributed`` the batch is that of all processes: the gradients that
    DistributedDataParallel averages are those of one process with the whole batch. Without
    gradients (in evaluation) every process takes its own batch, since their numbers may differ.

    Hallee et al. (arXiv 2401.15713) use 0.05 for balance and 0.01 for the others.

    Args:
        loss: any loss with its encoder as ``model``, this package's or sentence-transformers', but
            one that encodes without gradients (a gradient cache).
        load_balance, z_loss, mutual_information, expert_supervision: the coefficients, >= 0.
        num_domains: how many domain ids there are; by default as many as the encoder's config
            names. Needed by the last two terms.
        joint_decay: in (0, 1): the joint distribution of domain and expert is a running one,
            ``decay * running + (1 - decay) * batch``, for batches too small to tell it, or of one
            domain each. Only the batch's part has a gradient. The running joint is a buffer,
            ``running_joint`` [layers, domains, E], saved with the trainer's checkpoints; it moves
            in training only, and evaluation takes each batch's own.

    Attributes:
        last_metrics: the wrapped loss's and, detached, ``load_balance``, ``z_loss`` and
            ``expert_supervision`` without their coefficients, and ``mutual_information`` in nats,
            the mean over layers; those with a coefficient other than 0.

    Raises:
        TypeError: a loss without a ``model``.
        ValueError: for a value out of range, a model without routers or whose routing is
            enforced, and more domains than experts to supervise.
    """

    running_joint: Tensor | None

    def __init__(
        self,
        loss: nn.Module,
        *,
        load_balance: float = 0.0,
        z_loss: float = 0.0,
        mutual_information: float = 0.0,
        expert_supervision: float = 0.0,
        num_domains: int | None = None,
        joint_decay: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(getattr(loss, "model", None), nn.Module):
            raise TypeError(
                "loss must have its encoder as the attribute `model`; "
                f"got {type(loss).__name__}, which has none."
            )
        self.coefficients = {
            "load_balance": load_balance,
            "z_loss": z_loss,
            "mutual_information": mutual_information,
            "expert_supervision": expert_supervision,
        }
        for name, coefficient in self.coefficients.items():
            check_weight(name, coefficient)
        if joint_decay is not None and not 0.0 < joint_decay < 1.0:
            raise ValueError(f"joint_decay must lie in (0, 1); got {joint_decay!r}.")
        self.loss = loss
        self.joint_decay = joint_decay
        self.last_metrics: dict[str, Tensor] = {}
        num_layers, num_experts = _learned_routers(self.model)
        self.num_domains = self._checked_num_domains(num_domains, num_experts)
        joint = None
        if joint_decay is not None and mutual_information > 0:
            assert self.num_domains is not None  # checked: the term needs it
            joint = torch.zeros(num_layers, self.num_domains, num_experts)
        self.register_buffer("running_joint", joint)

    @property
    def model(self) -> nn.Module:
        """The wrapped loss's encoder."""
        return self.loss.model  # type: ignore[return-value]

    def _checked_num_domains(self, given: int | None, num_experts: int) -> int | None:
        if given is not None:
            check_count("num_domains", given)
        names = getattr(encoder_config(self.model), "domains", None) or ()
        num_domains = given or len(names) or None
        if num_domains is None and self._needs_domains():
            raise ValueError(
                f"num_domains must be given for {self._needs_domains()}: the encoder's config "
                "names no domains; got None."
            )
        supervised = self.coefficients["expert_supervision"] > 0
        if supervised and num_domains is not None and num_domains > num_experts:
            raise ValueError(
                "expert_supervision gives each domain an expert of its own: num_domains must be "
                f"at most num_experts = {num_experts}; got {num_domains}."
            )
        return num_domains

    def _needs_domains(self) -> list[str]:
        """The terms in use that need domain ids."""
        names = ("mutual_information", "expert_supervision")
        return [name for name in names if self.coefficients[name] > 0]

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Any:
        """The total of one batch.

        Args:
            sentence_features, labels: as the wrapped loss wants them; for mutual information and
                supervision every column needs ``domain_ids`` [B] int64.

        Returns:
            [] as the wrapped loss; where that returns a dict of terms, the dict with one more,
            ``router``.

        Raises:
            ValueError: missing ``domain_ids``, ids out of range (where values are checked), or an
                encoder that runs without gradients inside the loss.
        """
        columns = list(sentence_features)
        if not any(self.coefficients.values()):
            loss = self.loss(columns, labels)
            self.last_metrics = dict(getattr(self.loss, "last_metrics", {}))
            return loss
        domain_ids = self._domain_ids(columns) if self._needs_domains() else None
        with record_routing(self.model) as recorder:
            loss = self.loss(columns, labels)
        router = self._router_terms(recorder.result(), domain_ids)
        return {**loss, "router": router} if isinstance(loss, Mapping) else loss + router

    def _domain_ids(self, columns: Columns) -> Tensor:
        """[S] int64: the domain of every text, column after column."""
        for number, column in enumerate(columns):
            if "domain_ids" not in column:
                raise ValueError(
                    f"{' and '.join(self._needs_domains())}: domain_ids must be in the features of "
                    f"every column; column {number} has {sorted(column)}. Train with "
                    "moe_fast.training.DomainDataCollator and a dataset that has a domain column."
                )
        domain_ids = torch.cat([column["domain_ids"] for column in columns])
        check_ids("domain_ids", domain_ids, "num_domains", self.num_domains or 0)
        return domain_ids

    def _router_terms(self, record: RoutingRecord, domain_ids: Tensor | None) -> Tensor:
        """The weighted sum of the terms in use, []; sets ``last_metrics``."""
        reduce = global_sum if torch.is_grad_enabled() else one_process
        terms: dict[str, Tensor] = {}
        if self.coefficients["load_balance"]:
            terms["load_balance"] = load_balance(record.logits, record.top_k_index, reduce=reduce)
        if self.coefficients["z_loss"]:
            terms["z_loss"] = z_loss(record.logits, record.token_mask, reduce=reduce)
        metrics = {}
        if domain_ids is not None:
            sentence_ids = _sentence_ids(record, len(domain_ids))
            if self.coefficients["mutual_information"]:
                information = self._information(record, domain_ids[sentence_ids], reduce)
                terms["mutual_information"] = -information.sum()
                metrics["mutual_information"] = information.detach().mean()
            if self.coefficients["expert_supervision"]:
                terms["expert_supervision"] = expert_supervision(
                    record.logits, sentence_ids, domain_ids, record.token_mask, reduce=reduce
                )
        inner = getattr(self.loss, "last_metrics", {})
        self.last_metrics = inner | {n: term.detach() for n, term in terms.items()} | metrics
        weighted = [self.coefficients[name] * term for name, term in terms.items()]
        return torch.stack(weighted).sum()

    def _information(
        self, record: RoutingRecord, domain_of_token: Tensor, reduce: Reduce
    ) -> Tensor:
        """I(domain; expert) of each layer, [layers], in nats; moves the running joint."""
        assert self.num_domains is not None  # __init__
        joint = domain_expert_joint(
            record.logits, domain_of_token, self.num_domains, record.token_mask, reduce=reduce
        )
        training = self.model.training and torch.is_grad_enabled()
        if self.running_joint is None or self.joint_decay is None or not training:
            return mutual_information(joint)
        mixed = self.joint_decay * self.running_joint + (1 - self.joint_decay) * joint
        self.running_joint.copy_(mixed.detach())
        # It starts from zeros: its sum is 1 - decay^steps.
        return mutual_information(mixed / mixed.detach().sum((-2, -1), keepdim=True))

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return {
            "loss": type(self.loss).__name__,
            **self.coefficients,
            "num_domains": self.num_domains,
            "joint_decay": self.joint_decay,
        }


def _sentence_ids(record: RoutingRecord, num_texts: int) -> Tensor:
    """[T] int64: the text of every token, as numbered in the columns one after the other."""
    if record.sentence_ids is None or record.num_sentences != num_texts:
        raise ValueError(
            f"cannot tell the domain of what was encoded: the columns hold {num_texts} texts, the "
            f"loss encoded {record.num_sentences}. Use a loss that encodes each column once."
        )
    return record.sentence_ids


def _learned_routers(model: nn.Module) -> tuple[int, int]:
    """(layers, E) of the model's routers, which get their recording hooks here."""
    routers = hook_routers(model)
    if not routers:
        raise ValueError(
            "the loss's model must have mixture-of-experts layers for the router losses; "
            f"this {type(model).__name__} has no MoERouter. See moe_fast.upcycle."
        )
    if any(router.mode == "enforced" for router in routers):
        raise ValueError(
            "the loss's model must have learned routing for the router losses; its routing is "
            "'enforced', which has no router to train."
        )
    return len(routers), routers[0].num_experts
