"""Numbers as people read them."""

from __future__ import annotations

import math


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


def percent(share: float | None) -> str:
    """A share with three significant digits, with three decimals near the whole; a dash where there is none.

    Only what is exactly the whole is 100%.

    >>> percent(0.0290829), percent(0.05), percent(0.99915), percent(0.9999999), percent(1.0), percent(None)
    ('2.91%', '5.00%', '99.915%', '>99.999%', '100%', '-')
    """
    if share is None or not math.isfinite(share):
        return "-"
    if share in (0, 1):
        return f"{share:.0%}"
    if 0.99 < share < 1.01:
        text = f"{share:.3%}"
        return text if text != "100.000%" else ">99.999%" if share < 1 else ">100%"
    points = 100 * share
    if abs(points) < 1e-3:
        return f"{points:.2e}%"
    return f"{points:.{max(0, 2 - math.floor(math.log10(abs(points))))}f}%"


def plural(count: int, noun: str) -> str:
    """A count and what it counts.

    >>> plural(1, "module"), plural(3, "module")
    ('1 module', '3 modules')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def some(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """The first few of a list.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def more(count: int, remedy: str) -> str:
    """The line below a list that was cut: how many are missing, and which option lists them.

    >>> more(11, "--all")
    'and 11 more; --all lists every one.'
    """
    return f"and {count} more; {remedy} lists every one."
