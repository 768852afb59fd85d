"""The version of this package, and those that the bytes of an output depend on."""

from __future__ import annotations

__version__ = "0.1.0"


def versions(computed: bool) -> dict[str, str]:
    """Versions of this package and, where it `computed`, of torch; from metadata, which is cheaper than an import."""
    from importlib.metadata import version

    found = {"checkpoint-surgery": __version__}
    return found | {"torch": version("torch")} if computed else found
