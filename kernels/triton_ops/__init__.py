"""Triton kernels, one operation per file: its ``@triton.jit`` kernels and one plain launcher each.

This package knows torch and triton: arrays in, arrays out. It imports nothing of moe_fast, whose
``ops`` choose among the backends. It stands in ``kernels/`` and is imported as
``moe_fast.triton_ops``; ``docs/packaging.md`` says how, and why.
"""
