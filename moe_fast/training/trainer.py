"""sentence-transformers' trainer for models, losses and datasets that know domains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from moe_fast.training.callbacks import ExpertUsageCallback
from moe_fast.training.collator import DomainDataCollator
from moe_fast.training.loss_state import (
    LOSS_STATE_NAME,
    load_loss_state,
    own_state,
    save_loss_state,
)
from moe_fast.training.metrics import RunningMeans


class MoESentenceTransformerTrainer(SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` with what training over domains needs.

    - A dataset's domain column becomes domain ids, never a text: the default collator is a
      :class:`DomainDataCollator` with the model's domains or, for a model that knows none, with
      the dataset's names in sorted order.
    - What the loss itself has learned is saved with each checkpoint (``loss_state.safetensors``)
      and restored on resuming and with the best model; a checkpoint without it is an error.
    - A loss's parameters of one element (a temperature) get no weight decay, which would pull a
      ``log_temperature`` towards a temperature of 1.
    - The loss's ``last_metrics`` (for :class:`moe_fast.losses.InfoNCELoss` the in-batch accuracy
      and a learned temperature) are averaged into the logs and into evaluation's metrics, and
      the shares of an :class:`ExpertUsageCallback` reach every logger.

    Args:
        model, args, train_dataset, eval_dataset, loss, **kwargs: as in sentence-transformers.
        domain_column: the datasets' column of domain names or ids.

    Raises:
        ValueError: some datasets have the domain column and some have not; integer ids for a
            model that knows no domains; a loss with parameters of its own under several
            processes, whose gradients nothing would average.
    """

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: Any = None,
        *,
        domain_column: str = "domain",
        **kwargs: Any,
    ) -> None:
        self._domain_column = domain_column
        self._domain_datasets = _flatten(train=train_dataset, eval=eval_dataset)
        self._metrics = {"train": RunningMeans(), "eval": RunningMeans()}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            loss=loss,
            **kwargs,
        )
        del self._domain_datasets
        self.add_callback(_SetSamplerEpoch())
        own = own_state(self.loss)
        if own and self.args.world_size > 1:
            raise ValueError(
                f"loss has parameters or buffers of its own ({sorted(own)}), which are not yet "
                f"averaged over processes; got {self.args.world_size} processes. Use a loss "
                "without (learn_temperature=False), or one process."
            )

    # --- data ------------------------------------------------------------------------------------

    def get_data_collator(
        self, model: BaseModel, args: BaseTrainingArguments, processing_class: Any = None
    ) -> BaseDataCollator:
        """The domain collator where the datasets have a domain column, else the stock one."""
        stock = super().get_data_collator(model, args, processing_class)
        column = self._domain_column
        has = {name: column in data.column_names for name, data in self._domain_datasets.items()}
        if not any(has.values()):
            return stock
        if not all(has.values()):
            raise ValueError(
                f"every dataset must have the column {column!r} (domain_column), or none; "
                f"it is missing from {[name for name, found in has.items() if not found]}."
            )
        domains = getattr(model.config, "domains", None)
        return DomainDataCollator.from_model(
            model,
            domains=domains or _domain_names(self._domain_datasets, column),
            domain_column=column,
            router_mapping=stock.router_mapping,
            prompts=stock.prompts,
            max_length=stock.max_length,
        )

    # --- logs ------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch; its ``last_metrics`` are kept for the logs."""
        loss = self.loss[inputs["dataset_name"]] if isinstance(self.loss, dict) else self.loss
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kind = "train" if self.model.training else "eval"
        self._metrics[kind].add(getattr(loss, "last_metrics", {}))
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with each training loss, the loss's metrics and the experts' shares."""
        if "loss" in logs:
            logs = logs | self._metrics["train"].pop(self._mean_over_processes)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ExpertUsageCallback):
                    logs |= callback.pop_logs(self.state)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """sentence-transformers' loop; the loss's metrics are among the output's."""
        self._metrics["eval"] = RunningMeans()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._metrics["eval"].pop(self._mean_over_processes)
        named = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _mean_over_processes(self, means: Tensor) -> Tensor:
        return self.accelerator.reduce(means.to(self.args.device), reduction="mean")

    # --- the loss's own state --------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without the loss's own parameters of one element."""
        scalars = {name for name, tensor in own_state(self.loss).items() if tensor.numel() == 1}
        return [n for n in super().get_decay_parameter_names(model) if n not in scalars]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        output_dir = output_dir or self.args.output_dir or "."
        super()._save(output_dir, state_dict)
        save_loss_state(self.loss, output_dir)

    def _checkpoint_push_skip_names(self, checkpoint_folder: str) -> set[str]:
        return super()._checkpoint_push_skip_names(checkpoint_folder) | {LOSS_STATE_NAME}

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        load_loss_state(self.loss, checkpoint_path)
        super()._load_from_checkpoint(checkpoint_path)

    def _load_best_model(self) -> None:
        # The parent's method logs whatever goes wrong and returns: raise what concerns the loss.
        load_loss_state(self.loss, str(self.state.best_model_checkpoint))
        super()._load_best_model()


class _SetSamplerEpoch(TrainerCallback):
    """Tells the epoch to a batch sampler behind any number of wrappers.

    In an epoch resumed with several processes the trainer stops one wrapper short, and the order
    would be that of epoch 0.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None)


def _flatten(**datasets: Any) -> dict[str, Any]:
    """The datasets that have columns, by name; a mapping's parts as ``{name}.{part}``."""
    flat = {}
    for name, dataset in datasets.items():
        parts = dataset if isinstance(dataset, Mapping) else {"": dataset}
        for part, data in parts.items():
            if getattr(data, "column_names", None) is not None:
                flat[f"{name}.{part}".rstrip(".")] = data
    return flat


def _domain_names(datasets: Mapping[str, Any], column: str) -> list[str]:
    """Every domain name in the datasets, sorted."""
    values = {value for data in datasets.values() for value in _column(data, column)}
    if not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"the model knows no domains and column {column!r} holds {sorted(map(repr, values))}, "
            "not names; pass data_collator=DomainDataCollator.from_model(model, domains=[...])."
        )
    return sorted(values)


def _column(dataset: Any, column: str) -> Any:
    """A dataset's column; a streamed dataset is read through once."""
    if hasattr(dataset, "__len__"):
        return dataset[column]
    return (row[column] for row in dataset)
