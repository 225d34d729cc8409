"""Do experts help? One cell per model, data set, arm and seed, resumable.

    python -m experiments.claims --folder FOLDER                 # all cells that are missing
    python -m experiments.claims --folder FOLDER --model minilm --data medquad --arm c --seed 0
    python -m experiments.claims --report                        # table and picture, no training

Every arm has the same pretrained model, the same pairs in the same batches and the same steps.
Each cell writes one record, with the nDCG@10 of every query, into ``experiments/results/claims``.
"""
