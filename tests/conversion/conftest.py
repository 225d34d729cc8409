"""The small dense models and the batch of tests/models."""

from tests.models.conftest import batch, bert, dense

__all__ = ["batch", "bert", "dense"]
