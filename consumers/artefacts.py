"""Every kind of adapter and merged checkpoint that this project writes, those that others write, and broken ones."""

from __future__ import annotations

from pathlib import Path

from consumers import damaged, trained, written
from consumers.workshop import Workshop


def make_all(root: Path, only: str = "") -> Workshop:
    """Make every artefact whose name contains `only`, below `root`."""
    shop = Workshop(root, only)
    written.make_adapters(shop)
    trained.make_trained(shop)
    written.make_checkpoints(shop)
    damaged.make_adapters(shop)
    damaged.make_checkpoints(shop)
    written.make_converted(shop)
    return shop
