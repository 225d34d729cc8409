"""Triton kernels, one operation per file: its ``@triton.jit`` kernels and one plain launcher each.

This package takes and returns arrays, and imports torch and triton only. It imports nothing of
moe_fast, whose ``ops`` choose among the backends. Its folder is in ``kernels/``, and it is imported
as ``moe_fast.triton_ops``; ``docs/packaging.md`` says how, and why.

Terms: T tokens choose K of E experts each. A choice is a slot, S = T * K in all, and slot
``t * K + k`` is choice k of token t. Sorted by expert, the slots are the rows that the experts
compute. A slot whose id is no expert's is skipped; the skipped slots are the last rows. A program
is one instance of a kernel, and computes one tile of the result.
"""
