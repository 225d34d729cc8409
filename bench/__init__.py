"""Measurements, run from the repository root: ``python -m bench.moe_mlp``. Not in the wheel."""
