"""Damaged and hostile inputs, and kills: see ``python -m tests.hostile --help``."""
