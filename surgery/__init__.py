"""Checkpoint surgery: offline tools for stored model checkpoints.

>>> import surgery
>>> report = surgery.extract("base", "tuned", output="adapter", rank=16)  # doctest: +SKIP
>>> surgery.merge("base", "adapter", output="merged", reversible=True)  # doctest: +SKIP
>>> surgery.subtract("merged", output="base-again")  # doctest: +SKIP

Importing this imports neither torch nor numpy.
"""

from surgery.api import (
    analyze,
    combine,
    convert,
    dense,
    estimate,
    evaluate,
    extract,
    inspect,
    lint,
    merge,
    mixed_adapters,
    pull,
    push,
    resize,
    restore,
    subtract,
    switch,
    train,
    upcycle,
    verdicts,
    verify,
)
from surgery.errors import (
    FormatError,
    InputError,
    IntegrityError,
    MismatchError,
    MissingExtraError,
    NonFiniteError,
    OptionError,
    OutputError,
    SurgeryError,
    UnsupportedError,
)
from surgery.version import __version__

__all__ = [
    "FormatError",
    "InputError",
    "IntegrityError",
    "MismatchError",
    "MissingExtraError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "SurgeryError",
    "UnsupportedError",
    "__version__",
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
    "subtract",
    "switch",
    "train",
    "upcycle",
    "verdicts",
    "verify",
]
