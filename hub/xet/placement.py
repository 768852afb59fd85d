"""Where the chunks of a xorb lie that a client sent: in the xorb itself, or some of them in others.

A client may send chunks that are stored already, since it asks for only one in a thousand. They are not kept again.
What is left of such a xorb is stored as a smaller one, an ordinary xorb under the hash of its own chunks; and a
placement says for each chunk of the first where it lies. Clients go on to name the xorb that they sent: what they say
of its chunks is translated when a file is taken in, so that recipes name xorbs only that are really there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from surgery.errors import FormatError
from surgery.hub.xet import hashes
from surgery.hub.xet.shards import Term
from surgery.hub.xet.xorbs import XorbIndex


@dataclass(frozen=True)
class Placement:
    """Where the chunks of a xorb lie.

    Attributes:
        index: of the xorb as it was sent.
        terms: of xorbs that are stored: all of its chunks, in order.
    """

    index: XorbIndex
    terms: tuple[Term, ...]

    def within(self, begin: int, end: int) -> Iterator[Term]:
        """Where chunks `begin` to `end` lie, the last not included."""
        place = 0
        for term in self.terms:
            low, high = max(begin - place, 0), min(end - place, term.end - term.begin)
            if low < high:
                size = self.index.size(place + low, place + high)
                yield Term(term.xorb, term.begin + low, term.begin + high, size)
            place += term.end - term.begin


def plain(index: XorbIndex) -> Placement:
    """Of a xorb that is stored as it was sent."""
    return Placement(index, (Term(index.digest, 0, len(index), index.ends[-1]),))


def joined(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The same chunks in as few terms as they go into."""
    found: list[Term] = []
    for term in terms:
        if found and (found[-1].xorb, found[-1].end) == (term.xorb, term.begin):
            found[-1] = Term(term.xorb, found[-1].begin, term.end, found[-1].size + term.size)
        else:
            found.append(term)
    return tuple(found)


def encode_terms(terms: Iterable[Term]) -> list[list[object]]:
    """Terms as JSON has them, here and in recipes."""
    return [[hashes.text(term.xorb), term.begin, term.end, term.size] for term in terms]


def encode(placement: Placement) -> bytes:
    """The terms of a placement; its index is kept beside them as the xorb's footer."""
    return json.dumps(encode_terms(placement.terms), separators=(",", ":")).encode()


def decode(index: XorbIndex, data: bytes) -> Placement:
    """The placement that `encode` wrote. Raises `FormatError` for anything else."""
    where = f"What is known of the xorb {hashes.text(index.digest)}"
    try:
        terms = decode_terms(json.loads(data))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where} is damaged ({error}); restore it from a backup.") from error
    sizes = [index.size(begin, end) for begin, end in _ranges(terms) if end <= len(index)]
    if sizes != [term.size for term in terms] or sum(sizes) != index.ends[-1]:
        raise FormatError(f"{where} is damaged (its parts do not add up); restore it from a backup.")
    return Placement(index, terms)


def decode_terms(value: object) -> tuple[Term, ...]:
    """Terms from JSON. Raises `ValueError` or `TypeError` for what are none."""
    terms = []
    if not isinstance(value, list):
        raise TypeError("the terms are no list")
    for written, begin, end, size in value:
        xorb = hashes.digest_of(written)
        if xorb is None or not 0 <= begin < end or size <= 0:
            raise ValueError("a term is out of range")
        terms.append(Term(xorb, begin, end, size))
    return tuple(terms)


def _ranges(terms: Iterable[Term]) -> Iterator[tuple[int, int]]:
    """Which chunks of the placement each term stands for."""
    place = 0
    for term in terms:
        yield place, (place := place + term.end - term.begin)


def check(placement: Placement, stored: Callable[[bytes], XorbIndex]) -> bool:
    """Whether the chunks are really where the placement has them."""
    for (begin, end), term in zip(_ranges(placement.terms), placement.terms, strict=True):
        index = stored(term.xorb)
        if term.end > len(index) or placement.index.chunks(begin, end) != index.chunks(term.begin, term.end):
            return False
    return True
