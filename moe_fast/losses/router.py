"""Adds router losses to any loss of a mixture-of-experts encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.base import Columns, check_weight
from moe_fast.losses.batch_features import encoder_config
from moe_fast.losses.functional.mutual_information import (
    domain_expert_sums,
    joint_from_sums,
    mutual_information,
)
from moe_fast.losses.functional.router import (
    check_ids,
    expert_supervision_sums,
    load_balance_from_sums,
    load_balance_sums,
    mean_from_sums,
    one_process,
    z_loss_sums,
)
from moe_fast.losses.global_sum import global_sum
from moe_fast.losses.routing_record import RoutingRecord, hook_routers, record_routing
from moe_fast.ops.checks import check_count


class RouterLoss(nn.Module):
    """Adds weighted losses of the encoder's routers to another loss.

    Each term has a coefficient. It is computed over the real tokens of all text columns and summed
    over MoE layers (or averaged, see ``reduction``). With E experts, f_e the share of the tokens' K
    choices that went to expert e and P_e its mean probability:

        total = loss + load_balance * (E sum_e f_e P_e) + z_loss * mean(logsumexp^2)
                - mutual_information * I(domain; expert) + expert_supervision * cross entropy

    See :mod:`moe_fast.losses.functional` for the mathematics. ``expert_supervision`` averages the
    logits over layers first; expert i is the target of domain i. In training under
    ``torch.distributed`` the terms are those of the batch of all processes: the average gradient of
    DistributedDataParallel is the one that a single process with the whole batch would have.
    Without gradients (in evaluation) every process uses its own batch, because processes may have
    different numbers of batches.

    Hallee et al. (arXiv 2401.15713) use 0.05 for balance and 0.01 for the other terms. Their
    balance term is computed once over all layers (from means of sentences, counting the first
    choice), ours is a sum over layers: with L layers their 0.05 is about 0.05 / L here, or 0.05
    with ``reduction="mean"``.

    Args:
        loss: any loss of this package or of sentence-transformers that has its encoder as ``model``
            and encodes with gradients. A gradient cache does not: put
            :class:`moe_fast.losses.CachedLoss` around this loss.
        load_balance, z_loss, mutual_information, expert_supervision: the coefficients, >= 0.
        reduction: over MoE layers, "sum" or "mean". With "mean" a coefficient means the same
            whatever the number of layers. ``expert_supervision`` is one term of all layers either
            way.
        num_domains: the number of domain ids; by default that of the domains in the encoder's
            config. ``mutual_information`` and ``expert_supervision`` need it.
        joint_decay: in (0, 1). Estimates the joint distribution of domain and expert by a moving
            average, ``decay * running + (1 - decay) * batch``, for batches that are small or have
            one domain each. Only the batch's part has a gradient. The average is a buffer,
            ``running_joint`` [layers, domains, E], saved with the trainer's checkpoints. It is
            updated in training only; evaluation uses the distribution of each batch. ``None``:
            training uses the distribution of each batch, too.

    Attributes:
        last_metrics: those of the wrapped loss and, detached and without coefficients,
            ``load_balance``, ``z_loss`` (both reduced over layers as ``reduction`` says),
            ``expert_supervision``, and ``mutual_information`` in nats (the mean over layers). Terms
            with a coefficient of 0 are left out.

    Raises:
        TypeError: ``loss`` has no ``model``.
        ValueError: a value is out of range, ``loss`` is a gradient cache, the model has no routers
            or enforced routing, ``num_domains`` is needed but not known, or
            ``expert_supervision`` has more domains than experts.
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
        reduction: str = "sum",
        num_domains: int | None = None,
        joint_decay: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(getattr(loss, "model", None), nn.Module):
            raise TypeError(
                "loss must have its encoder as the attribute `model`; "
                f"got {type(loss).__name__}, which has none."
            )
        if getattr(loss, "uses_gradient_cache", False):
            raise ValueError(
                "loss must encode with gradients, which a gradient cache does not; got "
                f"{type(loss).__name__}. Put moe_fast's CachedLoss around the RouterLoss instead."
            )
        self.coefficients = {
            "load_balance": load_balance,
            "z_loss": z_loss,
            "mutual_information": mutual_information,
            "expert_supervision": expert_supervision,
        }
        for name, coefficient in self.coefficients.items():
            check_weight(name, coefficient)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean' over layers; got {reduction!r}.")
        self.reduction = reduction
        if joint_decay is not None and not 0.0 < joint_decay < 1.0:
            raise ValueError(f"joint_decay must lie in (0, 1); got {joint_decay!r}.")
        self.loss = loss
        self.joint_decay = joint_decay
        self.last_metrics: dict[str, Tensor] = {}
        self.num_layers, num_experts = _learned_routers(self.model)
        self.num_domains = self._checked_num_domains(num_domains, num_experts)
        joint = None
        if joint_decay is not None and mutual_information > 0:
            assert self.num_domains is not None  # checked: the term needs it
            joint = torch.zeros(self.num_layers, self.num_domains, num_experts)
        self.register_buffer("running_joint", joint)

    @property
    def model(self) -> nn.Module:
        """The encoder of the wrapped loss."""
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
        """Return the names of the terms in use that need domain ids."""
        names = ("mutual_information", "expert_supervision")
        return [name for name in names if self.coefficients[name] > 0]

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Any:
        """Compute the total of one batch.

        Args:
            sentence_features, labels: as the wrapped loss takes them. For ``mutual_information``
                and ``expert_supervision`` every column needs ``domain_ids`` [B] int64.

        Returns:
            [] with the dtype of the wrapped loss. If that returns a dict of terms, the same dict
            with one more term, ``router``.

        Raises:
            ValueError: ``domain_ids`` are missing or (if values are checked) out of range, or the
                encoder ran without gradients inside the loss.
        """
        columns = list(sentence_features)
        if not any(self.coefficients.values()):
            loss = self.loss(columns, labels)
            self.last_metrics = dict(getattr(self.loss, "last_metrics", {}))
            return loss
        self.check_domain_ids(columns)
        with record_routing(self.model) as recorder:
            loss = self.loss(columns, labels)
        router = self.from_statistics(self.statistics(recorder.result(), columns))
        return {**loss, "router": router} if isinstance(loss, Mapping) else loss + router

    def check_domain_ids(self, columns: Columns) -> None:
        """Raise ``ValueError`` if a term in use needs domain ids, and a column lacks them.

        Ids out of range raise it too, if values are checked.
        """
        for number, column in enumerate(columns if self._needs_domains() else ()):
            if "domain_ids" not in column:
                raise ValueError(
                    f"{' and '.join(self._needs_domains())}: domain_ids must be in the features of "
                    f"every column; column {number} has {sorted(column)}. Train with "
                    "moe_fast.training.DomainDataCollator and a dataset that has a domain column."
                )
            check_ids("domain_ids", column["domain_ids"], "num_domains", self.num_domains or 0)

    def statistics(self, record: RoutingRecord, columns: Columns) -> dict[str, Tensor]:
        """Compute the sums over tokens that :meth:`from_statistics` makes the terms of.

        The sums carry their graph. If a batch is encoded in parts, add up the parts' sums by name.

        Args:
            record: the routing of one encoding of ``columns``, in their order.
            columns: the features that were encoded.
        """
        sums: dict[str, Tensor] = {}
        if self.coefficients["load_balance"]:
            sums["load_balance"] = load_balance_sums(record.logits, record.top_k_index)
        if self.coefficients["z_loss"]:
            sums["z_loss"] = z_loss_sums(record.logits, record.token_mask)
        if not self._needs_domains():
            return sums
        domain_ids = torch.cat([column["domain_ids"] for column in columns])
        sentence_ids = _sentence_ids(record, len(domain_ids))
        if self.coefficients["mutual_information"]:
            assert self.num_domains is not None  # __init__
            sums["mutual_information"] = domain_expert_sums(
                record.logits, domain_ids[sentence_ids], self.num_domains, record.token_mask
            )
        if self.coefficients["expert_supervision"]:
            sums["expert_supervision"] = expert_supervision_sums(
                record.logits, sentence_ids, domain_ids, record.token_mask
            )
        return sums

    def from_statistics(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Compute the weighted sum of the terms, [], from the :meth:`statistics` of a whole batch.

        Also adds up the sums of all processes, updates the running joint and sets ``last_metrics``.
        Call it once per batch, after the wrapped loss.
        """
        reduce = global_sum if torch.is_grad_enabled() else one_process
        terms, metrics = {}, {}
        for name, own_sums in statistics.items():
            sums = reduce(own_sums)
            if name == "load_balance":
                terms[name] = load_balance_from_sums(sums)
            elif name == "mutual_information":
                information = self._information(joint_from_sums(sums))
                terms[name] = -information.sum()
                metrics[name] = information.detach().mean()
            else:
                terms[name] = mean_from_sums(sums)
            if self.reduction == "mean" and name != "expert_supervision":
                terms[name] = terms[name] / self.num_layers
        inner = getattr(self.loss, "last_metrics", {})
        self.last_metrics = inner | {n: term.detach() for n, term in terms.items()} | metrics
        weighted = [self.coefficients[name] * term for name, term in terms.items()]
        return torch.stack(weighted).sum()

    def _information(self, joint: Tensor) -> Tensor:
        """Return I(domain; expert) of each layer, [layers], in nats; updates the running joint."""
        training = self.model.training and torch.is_grad_enabled()
        if self.running_joint is None or self.joint_decay is None or not training:
            return mutual_information(joint)
        mixed = self.joint_decay * self.running_joint + (1 - self.joint_decay) * joint
        self.running_joint.copy_(mixed.detach())
        # The average starts from zeros, so its sum is 1 - decay^steps; divide by it.
        return mutual_information(mixed / mixed.detach().sum((-2, -1), keepdim=True))

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {
            "loss": type(self.loss).__name__,
            **self.coefficients,
            "reduction": self.reduction,
            "num_domains": self.num_domains,
            "joint_decay": self.joint_decay,
        }


def _sentence_ids(record: RoutingRecord, num_texts: int) -> Tensor:
    """Return the text of every token, [T] int64, numbered through all columns.

    Raises ``ValueError`` if the loss did not encode each column exactly once.
    """
    if record.sentence_ids is None or record.num_sentences != num_texts:
        raise ValueError(
            f"cannot tell the domain of what was encoded: the columns hold {num_texts} texts, the "
            f"loss encoded {record.num_sentences}. Use a loss that encodes each column once."
        )
    return record.sentence_ids


def _learned_routers(model: nn.Module) -> tuple[int, int]:
    """Put the recording hooks on the model's routers; return (number of layers, E).

    Raises ``ValueError`` if the model has no routers, or if its routing is enforced.
    """
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
