"""Every error this package raises on purpose.

SurgeryError
├── OptionError (ValueError)          an option, or a combination of options, that makes no sense
├── InputError (ValueError)           a checkpoint or adapter that cannot be used
│   ├── FormatError                   a file that is not what its name says: truncated, hostile, not UTF-8
│   ├── MismatchError                 inputs that do not belong together: names, shapes, another base
│   ├── NonFiniteError                NaN or infinity where a number is needed
│   └── UnsupportedError              a known kind of input that is refused by name, with the remedy
├── OutputError (OSError)             a target that exists, cannot be written, or does not fit the disk
├── IntegrityError                    bytes whose hash is not the one on record
└── MissingExtraError (ImportError)   a package that only one of the extras installs

Each message is one sentence that says what is wrong, in which tensor or file, what was found, what was expected,
and what to do about it. A check that can find several faults collects them all and raises once: `problems` holds
one line for each. The command line prints the sentence and exits with status 1 (2 for `OptionError`); anything that
is not a `SurgeryError` is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class SurgeryError(Exception):
    """Base of every error raised on purpose; `problems` lists the single faults, if there are several."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[SurgeryError], tuple[object, ...]]:
        return type(self), (self.message, self.problems)

    def __str__(self) -> str:
        return self.message


class OptionError(SurgeryError, ValueError):
    """An option that makes no sense, alone or with the others given."""


class InputError(SurgeryError, ValueError):
    """A checkpoint or adapter that cannot be used as asked."""


class FormatError(InputError):
    """A file that is truncated, hostile, or not in the format its name promises."""


class MismatchError(InputError):
    """Inputs that do not belong together: tensor names, shapes, or another base model."""


class NonFiniteError(InputError):
    """NaN or infinity in a tensor that takes part in arithmetic."""


class UnsupportedError(InputError):
    """A kind of input that is known and refused by name; the message holds the remedy."""


class OutputError(SurgeryError, OSError):
    """A target that exists already, cannot be written, or does not fit on the disk."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        SurgeryError.__init__(self, message, problems)


class IntegrityError(SurgeryError):
    """Bytes whose hash differs from the one on record."""


class MissingExtraError(SurgeryError, ImportError):
    """A package that only one of the extras installs."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package {package!r}, which is not installed; "
            f"install it with `pip install 'checkpoint-surgery[{extra}]'`."
        )
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return MissingExtraError, (self.package, self.extra)


def several(what: str, problems: Sequence[str]) -> str:
    """The sentence for one or more faults: the fault itself if it is alone, else a count and `what` they concern."""
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems with {what}:"


def first_line(error: BaseException) -> str:
    """What another library says is wrong, to be part of a sentence: its first line without the full stop.

    At most 200 characters of it: what a server answers is a stranger's.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
