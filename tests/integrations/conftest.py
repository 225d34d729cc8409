"""The tiny models of tests/encoding."""

from tests.encoding.conftest import dense, folder

__all__ = ["dense", "folder"]
