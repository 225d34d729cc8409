"""What the killed commands need, for the process that they are forked from."""

import bm25s  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
