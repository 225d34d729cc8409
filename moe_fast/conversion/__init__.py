"""Conversion between models: upcycle, extract, join, grow, import, quantize; frozen parameters."""

from moe_fast.conversion.extract import extract_expert
from moe_fast.conversion.grow import add_expert, remove_expert
from moe_fast.conversion.importing import IMPORT_STYLES, KeyRule, import_checkpoint
from moe_fast.conversion.join import from_experts
from moe_fast.conversion.lora import from_adapters, merge_lora, write_adapter
from moe_fast.conversion.nomic import export_nomic, import_nomic
from moe_fast.conversion.projection_head import add_projection_head
from moe_fast.conversion.quantize import quantize
from moe_fast.conversion.trainable import set_trainable
from moe_fast.conversion.upcycle import upcycle

__all__ = [
    "IMPORT_STYLES",
    "KeyRule",
    "add_expert",
    "add_projection_head",
    "export_nomic",
    "extract_expert",
    "from_adapters",
    "from_experts",
    "import_checkpoint",
    "import_nomic",
    "merge_lora",
    "quantize",
    "remove_expert",
    "set_trainable",
    "upcycle",
    "write_adapter",
]
