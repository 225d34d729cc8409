"""A sentence-transformers trainer for models, losses and datasets with domains."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from typing import Any

import torch
from accelerate.utils import gather_object
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from moe_fast import compat
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.training.callbacks import ExpertUsageCallback
from moe_fast.training.checkpoints import AtomicCheckpointTrainer
from moe_fast.training.collator import DomainDataCollator
from moe_fast.training.dataset_checks import (
    check_column_names,
    check_domains,
    check_exchanges,
    check_flag_rows,
    check_settings_match,
    check_swappable,
    domain_names,
    flatten,
    has_domain_column,
    text_columns,
)
from moe_fast.training.distributed import average_gradients, broadcast_from_first
from moe_fast.training.domain_ids import with_domain_names
from moe_fast.training.labels import check_label_batch, check_labels
from moe_fast.training.loss_state import (
    LOSS_STATE_NAME,
    load_loss_state,
    own_state,
    save_loss_state,
)
from moe_fast.training.metrics import RunningMeans
from moe_fast.training.row_sampling import has_flag_columns
from moe_fast.training.sampler import fixed_sizes
from moe_fast.training.throughput import Throughput
from moe_fast.training.trainable import check_precision, check_reached, check_trainable


class MoESentenceTransformerTrainer(AtomicCheckpointTrainer):
    """A ``SentenceTransformerTrainer`` for mixtures of experts and for data with domains.

    - A dataset's domain column is converted to domain ids and never embedded as a text. The
      collator is a :class:`DomainDataCollator` with the model's domains or, if the model knows
      none, with the dataset's domain names in sorted order. Its samples depend on ``args.seed``,
      the epoch and the row alone; in evaluation nothing is sampled.
    - The loss's own parameters are saved with each checkpoint (``loss_state.safetensors``), and
      restored when a run resumes and with the best model. If the file is missing, that is an error.
    - With several processes, the gradients of the loss's own parameters are averaged like the
      model's, and all processes start with the values of process 0.
    - A loss's parameters of one element (a temperature) get no weight decay, which would pull a
      ``log_temperature`` towards a temperature of 1.
    - The means of the loss's ``last_metrics`` (for :class:`moe_fast.losses.InfoNCELoss` the
      in-batch accuracy and a learned temperature) are added to the logs and to the metrics of
      evaluation. In the logs they are called ``{dataset}_{metric}`` if each dataset has its own
      loss.
    - The shares of an :class:`ExpertUsageCallback` reach every logger. ``tokens_per_second`` is the
      number of tokens, without padding, of all processes per second of forward and backward passes.
    - Checkpoints are complete or do not exist, see :class:`AtomicCheckpointTrainer`.

    Args:
        model, args, train_dataset, eval_dataset, loss, **kwargs: as in sentence-transformers.
        domain_column: the datasets' column of domain names or ids.
        swap_pairs: in training, use each pair (a, b) as (b, a) in half of the epochs (Hallee et
            al., arXiv 2401.15713). Rows must have two texts with the same prompt and length.
        num_negatives: the number of negatives to draw for each FlagEmbedding row; by default 1.
        max_length: the largest number of tokens per text, including prompt and special tokens, at
            most the model's own limit: one number, or one per column, such as
            ``{"query": 32, "positive": 128, "negative": 128}``. ``args.prompts`` can give an
            instruction per column in the same way.

    Raises:
        ValueError: only some datasets have the domain column.
        ValueError: the model does not know a domain, or it knows none and the data have integer
            ids.
        ValueError: FlagEmbedding rows have no passages to draw.
        ValueError: a column of numbers, or with nearly the name of the domain or label column,
            would be embedded as a text.
        ValueError: the loss treats every pair as a positive, and labels other than 1 are given.
        ValueError: `max_length` or the prompts name a column that does not exist, or pairs cannot
            be swapped.
        ValueError: `swap_pairs`, `num_negatives` or `max_length` is given together with a
            ``data_collator``.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: Any = None,
        *,
        domain_column: str = "domain",
        swap_pairs: bool = False,
        num_negatives: int | None = None,
        max_length: int | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        check_one_encoder(model)
        compat.check_overrides(type(self))
        self._domain_column = domain_column
        self._collation = {
            "swap_pairs": swap_pairs,
            "num_negatives": num_negatives,
            "max_length": max_length,
        }
        train_dataset = with_domain_names(train_dataset, domain_column)
        eval_dataset = with_domain_names(eval_dataset, domain_column)
        self._datasets = flatten(train=train_dataset, eval=eval_dataset)
        given = [name for name, value in self._collation.items() if value not in (None, False)]
        if given and kwargs.get("data_collator") is not None:
            raise ValueError(
                f"{given} are settings of the default collator, but a data_collator is given: "
                "pass them to that."
            )
        self._metrics = {"train": RunningMeans(), "eval": RunningMeans()}
        self._throughput = Throughput()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            loss=loss,
            **kwargs,
        )
        names = getattr(self.data_collator, "valid_label_columns", None) or ()
        check_labels(self._datasets, self.loss, names)
        self._reached = False
        self._read_streams_in_every_process()
        del self._datasets
        self.add_callback(_SetEpoch(self))

    # --- data ------------------------------------------------------------------------------------

    @compat.overrides
    def get_data_collator(
        self, model: BaseModel, args: BaseTrainingArguments, processing_class: Any = None
    ) -> DomainDataCollator:
        """Check the datasets' columns, and return the collator for them."""
        stock = super().get_data_collator(model, args, processing_class)
        column = self._domain_column
        domains = getattr(model.config, "domains", None) or ()
        has_domains = has_domain_column(self._datasets, column)
        if has_domains:
            domains = domains or domain_names(self._datasets, column)
            check_domains(self._datasets, column, domains)
        negatives = self._collation["num_negatives"]
        collator = DomainDataCollator.from_model(
            model,
            domains=domains,
            domain_column=column if has_domains else None,
            num_negatives=1 if negatives is None else negatives,
            swap_pairs=self._collation["swap_pairs"],
            max_length=self._collation["max_length"],
            seed=args.seed,
            router_mapping=stock.router_mapping,
            prompts=stock.prompts,
        )
        self._check_columns(collator)
        return collator

    @compat.overrides
    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add the callback as sentence-transformers does, for the datasets without domain columns.

        The model card counts and quotes the texts of all columns.
        """
        kept = self.train_dataset, self.eval_dataset
        if has_domain_column(self._datasets, self._domain_column):
            self.train_dataset, self.eval_dataset = (
                data if data is None else data.remove_columns(self._domain_column) for data in kept
            )
        # sentence-transformers shows a progress bar here even if the arguments disable it.
        quiet = redirect_stderr(StringIO()) if self.args.disable_tqdm else nullcontext()
        with quiet:
            super().add_model_card_callback(default_args_dict)
        self.train_dataset, self.eval_dataset = kept

    def _check_columns(self, collator: DomainDataCollator) -> None:
        check_column_names(self._datasets, self._domain_column, collator.valid_label_columns)
        columns = {
            name: text_columns(
                data.column_names,
                collator.num_negatives,
                collator.domain_column,
                collator.valid_label_columns,
            )
            for name, data in self._datasets.items()
        }
        lists = [n for n, d in self._datasets.items() if has_flag_columns(d.column_names)]
        if self._datasets and self._collation["num_negatives"] is not None and not lists:
            raise ValueError(
                "num_negatives is for rows of query, pos and neg, which hold lists of texts; the "
                f"text columns are {columns}."
            )
        check_flag_rows(self._datasets, collator.num_negatives)
        if collator.swap_pairs:
            trained = {n: c for n, c in columns.items() if n.split(".")[0] == "train"}
            check_swappable(trained, collator.prompts, collator.max_length)
        parts = [name.split(".", 1)[1] for name in columns if "." in name]
        every = [name for names in columns.values() for name in names]
        check_settings_match("max_length", collator.max_length, every)
        check_settings_match("prompts", collator.prompts, every + parts)

    @compat.overrides
    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> Any:
        loader = super()._build_dataloader(dataset, batch_size, dataset_kind)
        # The seeds of workers are drawn when they start, at other times in a resumed run. They must
        # not be drawn from the generator of dropout, whose numbers would then differ.
        loader.generator = torch.Generator().manual_seed(self.args.seed)
        if dataset_kind == "train" and isinstance(self.data_collator, DomainDataCollator):
            loader.collate_fn = self.data_collator.for_training()
        return loader

    def get_multi_dataset_batch_sampler(
        self, dataset: Any, batch_samplers: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Combine the datasets' batch samplers as sentence-transformers does.

        Samplers whose batches differ in size, which upstream does not support, are allowed: the
        combined sampler then has the batch size None, as accelerate expects.
        """
        with fixed_sizes(batch_samplers) as vary:
            sampler = super().get_multi_dataset_batch_sampler(
                dataset, batch_samplers, *args, **kwargs
            )
        if vary:
            sampler.batch_size = None
        return sampler

    # --- several processes -----------------------------------------------------------------------

    def _read_streams_in_every_process(self) -> None:
        """Let each process read a streamed dataset itself, and keep its share of every batch.

        By default accelerate lets process 0 read for all and send the parts. These must consist of
        tensors only, but sentence-transformers' batches also hold names, so training would fail.
        """
        config = self.accelerator.dataloader_config
        streamed = any(not hasattr(data, "__len__") for data in self._datasets.values())
        if streamed and config.dispatch_batches is None:
            config.dispatch_batches = False

    @compat.overrides
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Check the model and the losses, and train; see :meth:`AtomicCheckpointTrainer.train`.

        Raises:
            ValueError: the model has no trainable weights, or trainable weights are float16.
            ValueError: with several processes, the datasets' losses exchange different sums.
            FileNotFoundError, ValueError, BlockingIOError: as
                :meth:`AtomicCheckpointTrainer.train`.
        """
        if self.model_init is None:  # otherwise super().train() makes a new model
            check_trainable(self.model)
            check_precision(self.model, self.loss)
        if self.accelerator.num_processes > 1:
            if isinstance(self.loss, dict):
                check_exchanges(self.loss)
            broadcast_from_first(own_state(self.loss).values())
        return super().train(*args, **kwargs)

    @compat.overrides
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward and backward pass of one batch, and measure its time.

        With several processes, the last batch of an optimizer step averages the gradients of the
        loss's own parameters.

        Raises:
            ValueError: no weight of the model has a gradient after the first batch.
        """
        with self._throughput.timing(args[1] if len(args) > 1 else kwargs["inputs"]):
            loss = super().training_step(*args, **kwargs)
        if not self._reached and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_reached(self.model)  # DeepSpeed and FSDP keep gradients elsewhere
            self._reached = True
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            own = own_state(self.loss, keep_vars=True).values()
            average_gradients(p for p in own if isinstance(p, nn.Parameter))
        return loss

    # --- logs ------------------------------------------------------------------------------------

    @compat.overrides
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of one batch, and add its ``last_metrics`` to the means for the logs.

        Raises:
            ValueError: as `check_label_batch` for a batch of streamed or evaluation data.
        """
        name = inputs.get("dataset_name")
        loss = self.loss[name] if isinstance(self.loss, dict) else self.loss
        if not hasattr(self.train_dataset, "__len__") or not self.model.training:
            check_label_batch(loss, inputs.get("label"))
        if self.model.training:
            self._wrap_encoders(loss, model)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        metrics = getattr(loss, "last_metrics", {})
        if not self.model.training:
            self._metrics["eval"].add(metrics)  # the metrics' prefix has the name of the dataset
        elif isinstance(self.loss, dict):  # the metrics of different losses must not be averaged
            self._metrics["train"].add({f"{name}_{key}": value for key, value in metrics.items()})
        else:
            self._metrics["train"].add(metrics)
        return result

    def _wrap_encoders(self, loss: nn.Module, model: nn.Module) -> None:
        """Replace the model in the loss by its wrapper, which averages gradients over processes.

        sentence-transformers does so only for a loss that holds the model itself, not for a loss
        around another one.

        Raises:
            ValueError: with several processes, the loss does not hold the model as ``model``.
        """
        if model is self.model or any(module is model for module in loss.modules()):
            return
        self.override_model_in_loss(loss, model)
        if self.accelerator.num_processes > 1 and all(m is not model for m in loss.modules()):
            raise ValueError(
                f"{type(loss).__name__} does not hold the model as an attribute `model`, of its "
                "own or of a loss in it: its gradients would not be averaged over processes."
            )

    @compat.overrides
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's metrics, the throughput and the experts' shares to each training log."""
        if "loss" in logs:
            logs = logs | self._metrics["train"].pop(gather_object)
            logs |= self._throughput.pop(gather_object)
            for callback in self._usage_callbacks():
                logs |= callback.pop_logs(self.state)
        super().log(logs, start_time)

    def _usage_callbacks(self) -> list[ExpertUsageCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, ExpertUsageCallback)]

    def _log_state(self) -> dict[str, Any]:
        usage = [callback.state() for callback in self._usage_callbacks()]
        return {**super()._log_state(), "metrics": self._metrics["train"].state(), "usage": usage}

    def _restore_logs(self, state: dict[str, Any]) -> None:
        super()._restore_logs(state)
        self._metrics["train"].restore(state.get("metrics", {}))
        for callback, counted in zip(self._usage_callbacks(), state.get("usage", []), strict=False):
            callback.restore(counted)

    @compat.overrides
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as sentence-transformers does, and add the loss's metrics to the output's."""
        self._metrics["eval"] = RunningMeans()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._metrics["eval"].pop(gather_object)
        named = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    # --- the loss's own state --------------------------------------------------------------------

    @compat.overrides
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay, without the loss's own ones of one element."""
        scalars = {name for name, tensor in own_state(self.loss).items() if tensor.numel() == 1}
        return [n for n in super().get_decay_parameter_names(model) if n not in scalars]

    @compat.overrides
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        output_dir = output_dir or self.args.output_dir or "."
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_loss_state(self.loss, output_dir)

    @compat.overrides
    def _checkpoint_push_skip_names(self, checkpoint_folder: str) -> set[str]:
        return super()._checkpoint_push_skip_names(checkpoint_folder) | {LOSS_STATE_NAME}

    @compat.overrides
    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        load_loss_state(self.loss, checkpoint_path)
        super()._load_from_checkpoint(checkpoint_path)

    @compat.overrides
    def _load_best_model(self) -> None:
        # The parent's method only logs errors; errors about the loss's state must be raised.
        load_loss_state(self.loss, str(self.state.best_model_checkpoint))
        super()._load_best_model()


class _SetEpoch(TrainerCallback):
    """Sets the epoch of the trainer, the collator and the batch sampler inside all its wrappers.

    In an epoch resumed with several processes, transformers does not reach the innermost sampler,
    whose order would be that of epoch 0. Epochs are counted here, because the trainer's state does
    not have those of a streamed dataset.
    """

    def __init__(self, trainer: MoESentenceTransformerTrainer) -> None:
        self._trainer = trainer
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = self._trainer._resumed_at
        self._epoch = int(state.epoch or 0) if resumed is None else resumed.epoch
        self._trainer._take_up_logs()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._trainer._begin_pass(self._epoch, train_dataloader)
        if isinstance(self._trainer.data_collator, DomainDataCollator):
            self._trainer.data_collator.set_epoch(self._epoch)
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            for part in (sampler, getattr(sampler, "sampler", None)):
                set_epoch = getattr(part, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(self._epoch)
            sampler = getattr(sampler, "batch_sampler", None)
        self._epoch += 1
