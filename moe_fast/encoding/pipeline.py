"""What sentence-transformers' models share where a mixture is in them: checked, loaded, saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from moe_fast import compat
from moe_fast.encoding.domain_texts import domain_ids_of
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.model_card import describe_use, domain_of_the_card
from moe_fast.files import atomic_folder
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.portable import set_portable
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.saving import replaced_files


class MoEPipeline:
    """Stands before sentence-transformers' class in the bases of ours."""

    _mixture: ClassVar[type[MoEPreTrainedModel]] = MoEPreTrainedModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_overrides(type(self))
        path = args[0] if args else kwargs.get("model_name_or_path")
        if isinstance(path, (str, os.PathLike)):
            check_checkpoint(path)
        super().__init__(*args, **kwargs)
        check_one_encoder(self)
        if not isinstance(self.transformers_model, self._mixture):
            raise TypeError(
                f"{type(self).__name__} needs a mixture of experts; got "
                f"{type(self.transformers_model).__name__}. Make one with moe_fast.upcycle(...)."
            )
        # Makes the pipeline pass `domain` to the encoder, here and (saved in modules.json) in the
        # stock class.
        model: Any = self  # an nn.Module, by its other base
        first = next(iter(compat.child_modules(model)))
        own = (self.module_kwargs or {}).get(first, [])
        self.module_kwargs = {
            **(self.module_kwargs or {}),
            first: own if "domain" in own else [*own, "domain"],
        }

    @compat.overrides
    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        *args: Any,
        portable: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """As the stock class's, but atomic.

        An old model in ``path`` stays until the new one replaces it in one step; other files are
        kept, as in :func:`moe_fast.files.atomic_folder`.

        Args:
            portable: whether the stock class, such as
                ``SentenceTransformer(path, trust_remote_code=True)``, shall load it where moe_fast
                is not installed, as in ``save_pretrained`` of the encoder.

        Raises:
            ValueError: for an encoder that cannot be portable, such as one with a head.
        """
        if path is None:  # nothing to do, as for the stock class
            return
        set_portable(self.transformers_model, portable)
        with atomic_folder(path, replaces=replaced_files(self.transformers_model)) as temporary:
            super().save(str(temporary), model_name, create_model_card, *args, **kwargs)
            if not create_model_card:  # the encoder, which is in the same folder, has written one
                Path(temporary, "README.md").unlink(missing_ok=True)
        self.model_card_data.save_dir = str(path)

    @compat.overrides
    def save_pretrained(self, path: str, *args: Any, **kwargs: Any) -> None:
        """The same as :meth:`save`."""
        self.save(path, *args, **kwargs)

    @compat.overrides
    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As sentence-transformers', with a section that says how the mixture was made."""
        with domain_of_the_card(self.transformers_model.config):
            super()._create_model_card(path, *args, **kwargs)
        describe_use(self.transformers_model, self.model_type, Path(path, "README.md"))


class DomainTextPipeline(MoEPipeline):
    """A pipeline whose texts say their domain themselves: see :class:`DomainText`."""

    @compat.overrides
    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """As the stock class's, and the domains of texts that have one."""
        features = super().preprocess(inputs, prompt=prompt, **kwargs)
        domain_ids = domain_ids_of(self.transformers_model.config, inputs) if inputs else None
        return features if domain_ids is None else {**features, "domain_ids": domain_ids}
