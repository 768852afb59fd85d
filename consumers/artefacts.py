"""Every kind of adapter and merged checkpoint that this project writes, those that others write, and broken ones."""

from __future__ import annotations

from pathlib import Path

from consumers import combined, converted, damaged, trained, upcycled, written
from consumers.workshop import Workshop


def make_all(root: Path, only: str = "") -> Workshop:
    """Make every artefact whose name contains `only`, and what it takes for that, below `root`."""
    shop = Workshop(root, only)
    written.make_adapters(shop)
    trained.make_trained(shop)
    damaged.make_adapters(shop)
    combined.make_combined(shop)
    written.make_checkpoints(shop)
    upcycled.make_upcycled(shop)
    damaged.make_checkpoints(shop)
    converted.make_converted(shop)
    return shop
