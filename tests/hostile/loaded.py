"""What the killed commands need, for the process that they are forked from."""

import bm25s  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401

import moe_fast.cli.app
import moe_fast.cli.training
import moe_fast.data.mining
import moe_fast.evaluation.plots
import moe_fast.inference.embed
import moe_fast.integrations.sentence_transformers  # noqa: F401
