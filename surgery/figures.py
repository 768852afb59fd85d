"""Numbers as people read them: in reports, and on the pages of a server."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes: three digits and a decimal unit.

    >>> size(1234567), size(999_900), size(12)
    ('1.23 MB', '1 MB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(float(f"{count:.3g}")) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if abs(count) < 1000 else f"{count:.0f} TB"


def number(count: float) -> str:
    """A count: three digits and a unit.

    >>> number(4784128), number(999_999), number(300)
    ('4.78M', '1M', '300')
    """
    for unit in ("", "K", "M"):
        if abs(float(f"{count:.3g}")) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}B" if abs(count) < 1000 else f"{count:.0f}B"


def plural(count: int, noun: str) -> str:
    """A count and what it counts.

    >>> plural(1, "module"), plural(3, "module")
    ('1 module', '3 modules')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
