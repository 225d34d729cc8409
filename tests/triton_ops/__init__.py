"""Tests of the Triton kernels; relative imports need the package."""
