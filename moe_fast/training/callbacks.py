"""Logs the share of the tokens that each expert received during training."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_fast import compat
from moe_fast.layers import MoERouter


class ExpertUsageCallback(TrainerCallback):
    """Counts the tokens that each expert received in training, and logs every expert's share.

    Whenever a training loss is logged, these are logged for the steps since the previous log:

    - ``expert_share/layer_{i}/expert_{e}``: the expert's share of the tokens routed in the layer;
    - ``expert_load_imbalance``: the tokens of the busiest expert divided by the mean over the
      layer's experts, for the layer where this is largest. 1 means perfect balance; the number of
      experts means that one expert received all tokens.

    The counts stay on the device until they are logged, so that no step waits for them. Padding,
    evaluation and the recomputation of gradient checkpointing are not counted.

    Args:
        log_shares: also log the shares, one number per layer and expert. The token counts are in
            ``history`` in any case.

    Attributes:
        history: one dict per logged interval: ``step``, ``epoch`` and ``tokens``, which maps each
            layer's name to its experts' token counts.
    """

    def __init__(self, log_shares: bool = True) -> None:
        self.log_shares = log_shares
        self.history: list[dict[str, Any]] = []
        self._counts: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._warned = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a hook on every router; warn once if the model has none."""
        self._remove_hooks()
        self._counts = {}
        modules = () if model is None else model.named_modules()
        routers = {name: module for name, module in modules if isinstance(module, MoERouter)}
        if not routers and not self._warned:
            self._warned = True
            warnings.warn(
                "ExpertUsageCallback: the model is dense (it has no router); nothing to log.",
                stacklevel=2,
            )
        for name, router in zip(_layer_names(list(routers)), routers.values(), strict=True):
            self._hooks.append(router.register_forward_hook(self._counter(name)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the shares to the logs of a trainer that does not add them itself.

        Callbacks earlier in the list, such as reporters, do not see them then.
        :class:`moe_fast.training.MoESentenceTransformerTrainer` adds them before any callback runs.
        """
        if logs is None or "loss" not in logs:
            return
        extra = self.pop_logs(state)
        if extra:
            logs.update(extra)
            state.log_history[-1].update(extra)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the steps since the last log to ``history``, and remove the hooks."""
        self.pop_logs(state)
        self._remove_hooks()

    def pop_logs(self, state: TrainerState) -> dict[str, float]:
        """Return the shares and the imbalance since the last call, and reset the counts.

        The counts of all processes are added up, so every process must call this. The result is
        empty if no token was counted.
        """
        tokens = {name: _over_processes(count).tolist() for name, count in self._counts.items()}
        self._counts = {}
        if not any(map(sum, tokens.values())):
            return {}
        self.history.append({"step": state.global_step, "epoch": state.epoch, "tokens": tokens})
        shares = {
            name: [count / max(sum(counts), 1) for count in counts]
            for name, counts in tokens.items()
        }
        logs = {"expert_load_imbalance": max(max(s) * len(s) for s in shares.values())}
        if self.log_shares:
            for name, layer in shares.items():
                logs |= {f"expert_share/{name}/expert_{e}": share for e, share in enumerate(layer)}
        return {key: round(value, 4) for key, value in logs.items()}

    def state(self) -> dict[str, Any]:
        """Return the history, and this process's counts since the last log, as JSON can hold."""
        return {"history": self.history, "counts": {n: c.tolist() for n, c in self._counts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the history and the counts to a result of :meth:`state`."""
        self.history = list(state["history"])
        self._counts = {name: torch.tensor(counts) for name, counts in state["counts"].items()}

    def total_tokens(self) -> dict[str, list[int]]:
        """Return {layer: tokens per expert}, summed over the whole history."""
        total: dict[str, list[int]] = {}
        for entry in self.history:
            for name, counts in entry["tokens"].items():
                sums = total.get(name, [0] * len(counts))
                total[name] = [a + b for a, b in zip(sums, counts, strict=True)]
        return total

    def _counter(self, name: str) -> Any:
        def count(router: nn.Module, inputs: Any, output: Any) -> None:
            # Gradient checkpointing routes the same tokens again inside the backward pass.
            if not router.training or compat.in_backward():
                return
            tokens = output.tokens_per_expert.detach()
            previous = self._counts.get(name)
            self._counts[name] = (
                tokens.clone() if previous is None else previous.to(tokens.device) + tokens
            )

        return count

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _layer_names(module_names: list[str]) -> list[str]:
    """Return ``layer_{i}`` with the last number i in each module name.

    If a name has no number, or two names have the same, the module names are returned.
    """
    numbers = [re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.") for name in module_names]
    last = [found[-1] if found else None for found in numbers]
    if None in last or max(Counter(last).values(), default=1) > 1:
        return module_names
    return [f"layer_{number}" for number in last]


def _over_processes(count: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
    return count
