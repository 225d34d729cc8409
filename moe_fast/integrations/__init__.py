"""Bridges to libraries that are not core dependencies; each module needs the extra it names."""
