"""Sphinx's roles in docstrings, such as ``:func:`moe_fast.upcycle```, as links of the docs site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
# A name that has no page of its own stays without a link.
LINK = r'<autoref optional identifier="\1"><code>\1</code></autoref>'


class SphinxRoles(griffe.Extension):
    """Rewrites the docstring of every module, class, function and attribute."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See ``griffe.Extension``: called once for each object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(LINK, obj.docstring.value)
