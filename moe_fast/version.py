"""The version, read by the build from this file's source, and how people come by moe_fast."""

from __future__ import annotations

__version__ = "0.1.0"


def install_command(extra: str | None = None) -> str:
    """How to install moe_fast, or one of its extras, for messages.

    moe_fast is on no package index yet: it is installed from a checkout.

    Args:
        extra: such as ``"train"``; ``None`` for moe_fast alone.

    Returns:
        The command, and where to run it.
    """
    what = "." if extra is None else f"'.[{extra}]'"
    return f"pip install -e {what} (in a checkout of moe_fast)"


def build_command() -> str:
    """How to get the compiled library where an install came without it, for messages.

    Without build isolation, which hides torch from the build, and with an error in the place of
    pip's silence if something is missing.
    """
    return (
        "pip install setuptools cmake ninja && MOE_FAST_NATIVE=1 pip install "
        "--no-build-isolation --no-deps -e . (in a checkout of moe_fast, with a C++ compiler)"
    )
