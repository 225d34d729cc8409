"""Serves embeddings over HTTP, by OpenAI's protocol, with a domain for each text.

Texts of all requests that wait are computed together, without padding. ``moe-fast serve`` starts
it; :func:`create_app` makes the ASGI application for another server. It needs the extra
``serve``.
"""

from moe_fast.serving.app import create_app
from moe_fast.serving.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
