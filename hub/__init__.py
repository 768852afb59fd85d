"""Checkpoints and adapters that lie on a Hub: resolving ids, reading by range."""
