"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Examples may be slow on a busy machine; in CI the same ones are drawn every time.
settings.register_profile("moe_fast", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("moe_fast")
