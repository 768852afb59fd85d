"""The library's verbs: what each command does, as a function that returns the report the command prints.

A checkpoint is given as a path, a Hub id `name/repo[@revision]`, or an open `Checkpoint`; an adapter likewise, with a
weight as `path=0.5` or as a pair. What is to be written appears at `output` whole or not at all. The keywords of each
verb are typed (`surgery.keywords`), and one that it does not have raises `TypeError`.

Everything is imported when it is used, so that `import surgery` costs next to nothing.
"""

from __future__ import annotations

from surgery.api.adapters import combine, convert, extract, merge, resize, restore, subtract, switch
from surgery.api.calling import run_options
from surgery.api.evaluation import evaluate, mixed_adapters, verdicts
from surgery.api.looking import analyze, estimate, inspect, lint, verify
from surgery.api.mixtures import dense, upcycle
from surgery.api.registry import pull, push
from surgery.api.training import train

__all__ = [
    "analyze",
    "combine",
    "convert",
    "dense",
    "estimate",
    "evaluate",
    "extract",
    "inspect",
    "lint",
    "merge",
    "mixed_adapters",
    "pull",
    "push",
    "resize",
    "restore",
    "run_options",
    "subtract",
    "switch",
    "train",
    "upcycle",
    "verdicts",
    "verify",
]
