"""moe_fast: mixture-of-experts text encoders.

    model = moe_fast.upcycle("path/to/a/sentence-transformer", num_experts=5,
                             routing="enforced", domains=["a", "b", "c", "d", "e"])
    model.encode(["a text"], domain="a")

Importing this registers the architectures with transformers' AutoConfig and AutoModel, and
``experts_implementation="moe_fast"`` for transformers' own MoE models; it needs torch, transformers
and numpy, and loads neither sentence-transformers nor any other extra.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

_root = _Path(__file__).resolve().parent.parent
if (_root / "kernels" / "triton_ops").is_dir():  # a checkout: kernels/triton_ops is ours too
    __path__.append(str(_root / "kernels"))

from moe_fast import losses, ops  # noqa: E402
from moe_fast.conversion import (  # noqa: E402
    add_expert,
    add_projection_head,
    export_nomic,
    extract_expert,
    from_adapters,
    from_experts,
    import_checkpoint,
    import_nomic,
    merge_lora,
    quantize,
    remove_expert,
    upcycle,
    write_adapter,
)
from moe_fast.integrations import transformers_experts as _transformers_experts  # noqa: E402, F401
from moe_fast.layers import MoEBertLayer, MoEMLP, MoEMultiHeadMLP  # noqa: E402
from moe_fast.ops import available_backends, show_backends, use_backend  # noqa: E402
from moe_fast.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from moe_fast.conversion.onnx_export import export_onnx
    from moe_fast.encoding.cross_encoder import MoECrossEncoder
    from moe_fast.encoding.loading import load_three_heads
    from moe_fast.encoding.onnx_encoder import OnnxEncoder
    from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
    from moe_fast.encoding.sparse_encoder import MoESparseEncoder
    from moe_fast.encoding.three_head_encoder import (
        MoEThreeHeadEncoder,
        ThreeHeadEncoder,
        add_three_heads,
    )

__all__ = [
    "MoEBertLayer",
    "MoECrossEncoder",
    "MoEMLP",
    "MoEMultiHeadMLP",
    "MoESentenceTransformer",
    "MoESparseEncoder",
    "MoEThreeHeadEncoder",
    "OnnxEncoder",
    "ThreeHeadEncoder",
    "__version__",
    "add_expert",
    "add_projection_head",
    "add_three_heads",
    "available_backends",
    "export_nomic",
    "export_onnx",
    "extract_expert",
    "from_adapters",
    "from_experts",
    "import_checkpoint",
    "import_nomic",
    "load_three_heads",
    "losses",
    "merge_lora",
    "ops",
    "quantize",
    "remove_expert",
    "show_backends",
    "upcycle",
    "use_backend",
    "write_adapter",
]


_WITH_EXTRAS = {
    "MoECrossEncoder": "encoding.cross_encoder",
    "MoESentenceTransformer": "encoding.sentence_transformer",
    "MoESparseEncoder": "encoding.sparse_encoder",
    "MoEThreeHeadEncoder": "encoding.three_head_encoder",
    "OnnxEncoder": "encoding.onnx_encoder",
    "ThreeHeadEncoder": "encoding.three_head_encoder",
    "add_three_heads": "encoding.three_head_encoder",
    "export_onnx": "conversion.onnx_export",
    "load_three_heads": "encoding.loading",
}


def __getattr__(name: str) -> Any:
    """Load what needs an extra only when it is asked for."""
    if name in _WITH_EXTRAS:
        return getattr(_import_module(f"moe_fast.{_WITH_EXTRAS[name]}"), name)
    raise AttributeError(f"module 'moe_fast' has no attribute {name!r}")
