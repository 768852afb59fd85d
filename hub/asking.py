"""Conditions of a list as people and clients write them: `8..64`, `min:1M,max:2B`, and the tags of a base."""

from __future__ import annotations

import re
from fractions import Fraction

from surgery.errors import OptionError
from surgery.hub.index import Index, MadeFrom, Reader, Span, made_from
from surgery.hub.naming import parse_repository, why_not_a_repository

_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([kmbtKMBT]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_RANKS = re.compile(r"(\d{1,9})?(\.\.)?(\d{1,9})?")
_BASE = "base_model:"


def rank_span(text: str) -> Span:
    """`16`, `8..64`, `8..` or `..64`. Raises `OptionError`."""
    found = _RANKS.fullmatch(text.strip())
    if found is None or not (found[1] or found[3]):
        raise OptionError(f"The rank is {text[:100]!r}, expected a number such as 16, or a range: 8..64, 8.. or ..64.")
    if found[2] is None:
        return Span(int(text), int(text))
    return Span(int(found[1]) if found[1] else None, int(found[3]) if found[3] else None)


def parameter_span(text: str) -> Span:
    """`min:1M,max:2B`, or one of the two, as the Hub's client sends it. Raises `OptionError`."""
    ends: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        found = _NUMBER.fullmatch(value.strip())
        if name not in ("min", "max") or found is None or name in ends:
            raise OptionError(
                f"num_parameters is {text[:100]!r}, expected 'min:1M,max:2B' or one of the two, with K, M, B or T."
            )
        number = Fraction(found[1]) * _UNITS[found[2].lower()]
        # Whole parameters only: at least 0.5 is at least 1, at most 0.5 is at most 0.
        ends[name] = int(number) if name == "max" or number.denominator == 1 else int(number) + 1
    return Span(ends.get("min"), ends.get("max"))


def base_of_tag(index: Index, tag: str, reader: Reader) -> MadeFrom | None:
    """`base_model:ID` and `base_model:adapter:ID` as a condition, so that renames and hashes count too; else None."""
    if not tag.lower().startswith(_BASE):
        return None
    relation, _, name = tag[len(_BASE) :].rpartition(":")
    if why_not_a_repository(name) is not None:
        return None
    return made_from(index, parse_repository(name), reader, relation.lower() or None)
