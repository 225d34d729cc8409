"""``python -m moe_fast.cli``, and ``torchrun -m moe_fast.cli train ...``."""

from moe_fast.cli import main

if __name__ == "__main__":  # embed's worker processes import this module
    main()
