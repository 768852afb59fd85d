"""The rules of a `.gitignore` at the top of a repository, as git reads them.

Source: gitignore(5), git 2.39; here a slash ends the part also inside `[...]` and after a backslash. The patterns come
from strangers, so none of them becomes a regular expression that can take long: a path is compared part by part, and a
part with `fnmatch`'s wildcards by going along both once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from surgery.hub.server.web import HttpError

MAX_RULES = 64 << 10  # characters
_MOST_RULES = 1000


@dataclass(frozen=True)
class Rule:
    """One line.

    Attributes:
        parts: of the pattern; `**` stands for any number of folders.
        negated: it lets in what one before it left out.
        folders: it is for folders only.
    """

    parts: tuple[str, ...]
    negated: bool
    folders: bool


def ignore_rules(text: str) -> list[Rule]:
    """The rules of a file. Raises `HttpError` beyond the limits."""
    if len(text) > MAX_RULES:
        raise HttpError(413, f"A .gitignore may have {MAX_RULES} characters.")
    rules = [rule for line in text.splitlines() if (rule := _rule(line)) is not None]
    if len(rules) > _MOST_RULES:
        raise HttpError(413, f"A .gitignore may have {_MOST_RULES} rules.")
    return rules


def _rule(line: str) -> Rule | None:
    # Trailing blanks do not count, unless a backslash is before them.
    bare = line.rstrip(" \t")
    if bare.endswith("\\") and len(bare) < len(line):
        bare += line[len(bare)]
    if not bare or bare.startswith("#"):
        return None
    negated = bare.startswith("!")
    pattern = bare[1:] if negated else bare
    folders = pattern.endswith("/")
    pattern = pattern.rstrip("/") if folders else pattern
    anchored = "/" in pattern
    parts = tuple(pattern.removeprefix("/").split("/"))
    if not pattern:
        return None
    return Rule(parts if anchored else ("**", *parts), negated, folders)


def is_ignored(rules: Sequence[Rule], path: str) -> bool:
    """Whether git would leave a file out. What lies in a folder that is left out cannot be let in again."""
    if not rules:
        return False
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        found = next((rule for rule in reversed(rules) if _applies(rule, parts[:depth], depth < len(parts))), None)
        if found is not None and not found.negated:
            return True
    return False


def _applies(rule: Rule, parts: Sequence[str], is_folder: bool) -> bool:
    return (is_folder or not rule.folders) and _matches(rule.parts, tuple(parts))


def _matches(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a whole path fits. Goes along both and comes back to the last `**` only."""
    here = there = 0
    star: tuple[int, int] | None = None
    while there < len(parts):
        if here < len(pattern) and pattern[here] == "**":
            if here == len(pattern) - 1:
                # At the end it stands for everything inside, which is one part at least.
                return True
            star = (here, there)
            here += 1
        elif here < len(pattern) and _fits(pattern[here], parts[there]):
            here, there = here + 1, there + 1
        elif star is not None:
            star = (star[0], star[1] + 1)
            here, there = star[0] + 1, star[1]
        else:
            return False
    return here == len(pattern)


@lru_cache(4096)
def _fits(pattern: str, name: str) -> bool:
    """Whether a part of a path fits: `*`, `?`, `[...]` and backslashes, none of which stands for a slash."""
    here = there = 0
    star: tuple[int, int] | None = None
    while there < len(name):
        if here < len(pattern) and pattern[here] == "*":
            star = (here, there)
            here += 1
            continue
        step = _step(pattern, here, name[there]) if here < len(pattern) else 0
        if step:
            here, there = here + step, there + 1
        elif star is not None:
            star = (star[0], star[1] + 1)
            here, there = star[0] + 1, star[1]
        else:
            return False
    return all(char == "*" for char in pattern[here:])


def _step(pattern: str, here: int, char: str) -> int:
    """How much of the pattern stands for this character; 0 where none does."""
    first = pattern[here]
    if first == "?":
        return 1
    if first == "\\" and here + 1 < len(pattern):
        return 2 if pattern[here + 1] == char else 0
    if first == "[":
        end = _closing(pattern, here)
        return end + 1 - here if end and _in_set(pattern[here + 1 : end], char) else 0
    return 1 if first == char else 0


def _closing(pattern: str, here: int) -> int:
    """Where a set ends; 0 for one that does not, which fits nothing."""
    place = here + 1
    if pattern[place : place + 1] in ("!", "^"):
        place += 1
    if pattern[place : place + 1] == "]":
        place += 1
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place if place < len(pattern) else 0


def _in_set(text: str, char: str) -> bool:
    negated = text[0] in "!^"
    place = 1 if negated else 0
    found = False
    while place < len(text):
        place += text[place] == "\\" and place + 1 < len(text)
        low = high = text[place]
        if text[place + 1 : place + 2] == "-" and place + 2 < len(text):
            place += 2
            place += text[place] == "\\" and place + 1 < len(text)
            high = text[place]
        found = found or low <= char <= high
        place += 1
    return found != negated
