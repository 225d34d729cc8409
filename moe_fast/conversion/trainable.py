"""Which of a mixture's parameters training may change."""

from __future__ import annotations

from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.quantization import check_not_quantized
from moe_fast.ops.checks import check_choice

TRAINABLE = ("all", "experts", "experts+router")


def set_trainable(
    model: MoEPreTrainedModel, trainable: str = "all", *, freeze_embeddings: bool = False
) -> None:
    """Set ``requires_grad`` of every parameter of ``model``. Frozen ones get no optimizer state.

    Args:
        trainable: "all"; "experts", only the stacked expert parameters (and the maps around them in
            multi-head blocks); or "experts+router".
            Yu, arXiv 2412.17364, trains only the experts of one projection. A head is trained
            only with "all".
        freeze_embeddings: with "all", freeze the embeddings: tokens (including domain tokens),
            positions and types, and their normalisation. They are the larger part of a
            small multilingual model.

    Raises:
        ValueError: for an unknown name, and for a quantised model.
    """
    check_choice("trainable", trainable, TRAINABLE)
    check_not_quantized(model, "trained")
    model.requires_grad_(trainable == "all")
    if trainable == "all":
        words = model.get_input_embeddings()
        getattr(model.base_model, "embeddings", words).requires_grad_(not freeze_embeddings)
        return
    for mlp in model.moe_mlps().values():
        for _, parameter in mlp.expert_parameters():
            parameter.requires_grad_(True)
        for linear in mlp.children():  # of a multi-head block, as new as its experts
            linear.requires_grad_(linear is not mlp.router)
        if trainable == "experts+router":
            mlp.router.requires_grad_(True)
