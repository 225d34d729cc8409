"""Measurements, run from the repository root: ``python -m bench``; installed, ``moe-fast bench``.

A wheel holds this folder as ``moe_fast.bench``: hence imports from here are relative.
"""
