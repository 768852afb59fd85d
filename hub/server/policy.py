"""What a server takes in."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import OptionError

ALLOW, FLAG, REFUSE = "allow", "flag", "refuse"
PICKLE = (ALLOW, FLAG, REFUSE)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a server takes in.

    Attributes:
        pickle: `refuse` pickles, `flag` them for whoever looks at a listing, or `allow` them without looking.
        quota: bytes that the repositories of a namespace may have together, each content counted once.
        max_file: bytes that a file may have.
    """

    pickle: str = FLAG
    quota: int | None = None
    max_file: int | None = None

    def __post_init__(self) -> None:
        if self.pickle not in PICKLE:
            raise OptionError(f"--pickle is {self.pickle!r}, expected one of {', '.join(PICKLE)}.")
        for name, value in (("--quota", self.quota), ("--max-file-size", self.max_file)):
            if value is not None and value <= 0:
                raise OptionError(f"{name} is {value}, expected a number of bytes above 0.")
