"""The version, read by the build from this file's source."""

__version__ = "0.1.0"
