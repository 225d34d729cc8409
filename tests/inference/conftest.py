"""The tiny models of tests/encoding."""

import pytest

from tests.encoding.conftest import models

pytest.importorskip("pyarrow", reason="needs the extra moe-fast[train]")

__all__ = ["models"]
