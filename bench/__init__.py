"""Benchmarks, run from the repository root by ``python -m bench``, installed by ``moe-fast bench``.

A wheel contains this folder as ``moe_fast.bench``; therefore imports between its files are
relative.
"""
