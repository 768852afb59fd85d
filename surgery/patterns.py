"""Patterns from configs and from the command line, matched without letting a hostile one run for ever.

Python's `re` backtracks: `(a+)+$` takes time exponential in the length of the name it is matched with, and
`.*.*.*.*x` a high power of it. A pattern in which an unbounded repetition holds another, or an alternation, or which
has more than a few repetitions, is refused before it is tried.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from surgery.errors import FormatError

_MAX_LENGTH = 1_000
_UNBOUNDED = 16  # as good as unbounded for the names there are
_MAX_REPETITIONS = 4


def matches(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means the module `name`: PEFT's `get_pattern_key`."""
    return _compiled(rf"(.*\.)?({pattern})$").match(name) is not None


def first_match(patterns: Mapping[str, object], name: str, default: object) -> object:
    """The value of the first pattern that means `name`, in the order of the file."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A user's regular expression. Raises `FormatError` for one that is not valid or might never end."""
    return _compiled(pattern)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _MAX_LENGTH:
        raise FormatError(f"A pattern of {len(pattern)} characters is longer than the {_MAX_LENGTH} allowed.")
    try:
        tree = re._parser.parse(pattern)  # type: ignore[attr-defined]  # there is no public parser
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"The pattern {pattern!r} is not a valid regular expression ({error}).") from error
    if _repetitions(tree, repeated=False) > _MAX_REPETITIONS:
        raise FormatError(
            f"The pattern {pattern!r} nests repetitions or has more than {_MAX_REPETITIONS}, which can take for ever "
            "to match; write a simpler one."
        )
    return compiled


def _repetitions(node: Iterable[tuple[object, Any]], repeated: bool) -> float:
    """Unbounded repetitions in a pattern; infinite where one holds another, or an alternation.

    Walks the parser's tree of (operation, arguments).
    """
    count = 0.0
    for operation, arguments in node:
        name = str(operation)
        inner = repeated
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = arguments
            unbounded = most == re._constants.MAXREPEAT or most > _UNBOUNDED  # type: ignore[attr-defined]  # likewise
            if unbounded and repeated:
                return math.inf
            count += unbounded
            inner = repeated or unbounded
            bodies = [body]
        elif name == "BRANCH":
            if repeated:
                return math.inf
            bodies = arguments[1]
        elif name == "SUBPATTERN":
            bodies = [arguments[-1]]
        elif name in ("ASSERT", "ASSERT_NOT"):
            bodies = [arguments[1]]
        elif name == "ATOMIC_GROUP":
            bodies = [arguments]
        elif name == "GROUPREF_EXISTS":
            bodies = [body for body in arguments[1:] if body is not None]
        else:
            continue
        count += sum(_repetitions(body, inner) for body in bodies)
    return count
