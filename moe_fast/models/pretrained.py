"""What every mixture is, bare or with a head: saved, loaded, counted, initialised."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from moe_fast import compat
from moe_fast.architectures import Architecture
from moe_fast.files import atomic_folder
from moe_fast.layers import MoEMLP, MoERouter
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.loading import naming
from moe_fast.models.lora import freeze_shared, has_lora
from moe_fast.models.model_card import has_foreign_card, write_model_card
from moe_fast.models.portable import set_portable
from moe_fast.models.quantization import (
    check_stays_float32,
    freeze,
    is_quantized,
    num_int8_weights,
)
from moe_fast.models.saving import check_no_adapter, replaced_files
from moe_fast.models.strict import check_filled_once, check_loading_info
from moe_fast.version import __version__


class MoEPreTrainedModel(PreTrainedModel):
    """What all the models share; stands before the dense model in their bases.

    Attributes:
        architecture: the entry of the table that the model was made from.
        moe_head: the end of the name of a model with a head, "ForMaskedLM"; empty: it has none.
    """

    architecture: Architecture
    moe_head: ClassVar[str] = ""
    is_moe_fast_model = True
    supports_gradient_checkpointing = True  # our layers do, whatever the dense model's say

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The encoder's layers, dense and MoE ones."""
        return self.base_model.get_submodule(self.architecture.layers)

    def moe_mlps(self) -> dict[int, MoEMLP]:
        """The MoE layers' mixtures, by layer index."""
        mlps = {i: self.encoder_layers[i].mlp for i in self.config.moe_layers}
        # PEFT wraps a module whose parameters it adapts.
        return {
            i: mlp.get_base_layer() if hasattr(mlp, "get_base_layer") else mlp
            for i, mlp in mlps.items()
        }

    @compat.overrides
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, (MoEMLP, MoERouter)):
            return
        init = compat.initialization()
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith(("_bias", "_B")):  # and of LoRA's pairs
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def num_parameters(
        self,
        only_trainable: bool = False,
        exclude_embeddings: bool = False,
        only_active: bool = False,
    ) -> int:
        """Number of parameters, as transformers counts them.

        Args:
            only_active: leave out the experts that a token does not visit: K of E count, and in a
                multi-head block K for each head, since each may visit others.

        The 8-bit integers of a quantised mixture count too, though they are no parameters of
        PyTorch's.
        """
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if is_quantized(self) and not only_trainable:
            every, active = num_int8_weights(self, self.config.num_experts_per_tok)
            return total + (active if only_active else every)
        if not only_active:
            return total
        idle = 0
        for mlp in self.moe_mlps().values():
            experts = (
                p for _, p in mlp.expert_parameters() if p.requires_grad or not only_trainable
            )
            idle += sum(p[0].numel() for p in experts) * (mlp.num_experts - mlp.experts_per_token)
        return total - idle

    @classmethod
    @compat.overrides
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but strict: nothing is left to a random initialisation.

        A bare encoder's pooler may be missing, as some models are saved without one. A head may be
        missing as a whole, as from the checkpoint of a bare encoder: then a warning says that it
        is new, and must be trained. Of an encoder with LoRA experts only these and the routers ask
        for gradients.

        Raises:
            ValueError: for a damaged file, which the message names, for other weights that the
                checkpoint lacks, and for one that it gives twice.
            FileNotFoundError: for a missing configuration, weights file or shard.
        """
        folder = None
        if isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            check_checkpoint(folder)
        wanted = kwargs.pop("output_loading_info", False)
        with naming(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        check_loading_info(info, model, pretrained_model_name_or_path)
        check_filled_once(model, folder)
        if is_quantized(model):
            freeze(model)
        elif has_lora(model):
            freeze_shared(model)
        return (model, info) if wanted else model

    @compat.overrides
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ``nn.Module``'s, which ``to`` and ``bfloat16`` call; a cast of integers is refused."""
        if is_quantized(self):
            check_stays_float32(fn)
        return super()._apply(fn, recurse)

    @compat.overrides
    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        *,
        portable: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers', but whole or not at all, and with a model card.

        An old model in ``save_directory`` stays until the new one takes its place in one step;
        files of others, and a ``README.md`` that somebody else wrote, are kept: see
        :func:`moe_fast.files.atomic_folder`. With ``distributed_checkpoint=True``, where every
        process writes files of its own, the files are written in place.

        Args:
            portable: ``True``: write a file of code, too, with which ``trust_remote_code=True``
                loads the folder where moe_fast is not installed; this save and the next ones do,
                also of the model that is loaded from there. ``False``: no longer.

        Raises:
            ValueError: for adapters that ``peft.get_peft_model`` put in, which its ``PeftModel``
                saves: a folder with their wrapped weights could not be loaded. For what cannot be
                portable: heads, encoders that are not transformers', and adapters alone.
        """
        if not compat.saves_adapter_alone(self):
            check_no_adapter(self)
        set_portable(self, portable)
        self.config.moe_fast_version = __version__
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).resolve().name)
        replaced = replaced_files(self, kwargs.get("variant"))
        with atomic_folder(save_directory, replaces=replaced) as temporary:
            with compat.adapter_methods():
                super().save_pretrained(str(temporary), is_main_process=True, **kwargs)
            if not has_foreign_card(save_directory):
                write_model_card(self, temporary)

    @compat.overrides
    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', but refused on a mixture that has not been saved and loaded.

        An adapter is saved alone, with the place of its base, from which loading it starts.
        """
        if not self.name_or_path:
            raise ValueError(
                "add_adapter needs a mixture loaded from where it was saved, since an adapter is "
                "saved as a reference to its base; this one was made in memory. Save it with "
                "save_pretrained, load it, and add the adapter to that."
            )
        with compat.adapter_methods():
            super().add_adapter(*args, **kwargs)

    @compat.overrides
    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; where it refuses the installed peft, the error says what works."""
        with compat.adapter_methods():
            return super().load_adapter(*args, **kwargs)

    @compat.overrides
    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but refused where domain tokens are the vocabulary's last rows."""
        if self.config.domain_token_ids and (args or kwargs):
            raise ValueError(
                "resize_token_embeddings would cut off or move the domain tokens (ids "
                f"{self.config.domain_token_ids}). Add tokens to the dense model and its tokenizer "
                "before upcycling."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()
