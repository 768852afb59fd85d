"""Blinded pairs of two models' answers for a judge, and what the judge's verdicts come to.

As LIMA compares (Zhou et al. 2023, section 4.1): a judge sees a prompt and two answers, in an order drawn for each
pair, and says which is better, or neither. Who wrote which is in a key that the judge does not see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, MissingExtraError, several
from surgery.evaluation.report import Tally, VerdictsReport
from surgery.hashing import new_hash

_VERDICTS = ("a", "b", "tie")
_LEVEL = 0.95


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers, in the order in which the judge sees them; `verdict` is for the judge to fill in."""

    id: str
    prompt: str
    a: str
    b: str
    verdict: str | None = None


def make_pairs(
    prompts: Sequence[str], answers: Sequence[str], others: Sequence[str], names: tuple[str, str], seed: int
) -> tuple[bytes, bytes]:
    """The file for the judge, JSONL, and the key, JSON.

    Args:
        prompts: as a reader sees them.
        answers: of one model to each.
        others: of the other.
        names: of the two.
        seed: of the order in each pair.
    """
    hasher = new_hash()
    hasher.update(repr((prompts, answers, others, seed)).encode(errors="surrogatepass"))
    start = hasher.hexdigest()[:8]  # pairs and key that do not belong together have no id in common
    swapped = _coins(len(prompts), seed)
    lines, key = [], {}
    for number, (prompt, one, two, swap) in enumerate(zip(prompts, answers, others, swapped, strict=True)):
        pair = Pair(f"{start}-{number + 1}", prompt, *((two, one) if swap else (one, two)))
        lines.append(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
        key[pair.id] = {"a": names[swap], "b": names[not swap]}
    content = {"model": names[0], "against": names[1], "pairs": key}
    return "".join(lines).encode(errors="surrogatepass"), (json.dumps(content, indent=1) + "\n").encode()


def read_verdicts(verdicts: Path, key: Path) -> VerdictsReport:
    """Count a judge's verdicts.

    Args:
        verdicts: JSONL; each line has `id` and `verdict`: `a`, `b` or `tie`, or null for none yet. The file of pairs
            itself will do, filled in.
        key: written beside the pairs.

    Raises:
        FormatError: lines that are neither, or that belong to other pairs.
        InputError: no verdict at all.
    """
    model, against, known = _read_key(key)
    counts = {model: 0, against: 0, "tie": 0}
    seen: set[str] = set()
    problems = []
    for number, line in enumerate(_lines(verdicts), 1):
        if not line.strip():
            continue
        where = f"{verdicts}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            problems.append(f"{where}: not JSON, expected one object to a line.")
            continue
        given = found if isinstance(found, dict) else {}
        pair, verdict = given.get("id"), given.get("verdict")
        if not isinstance(pair, str) or pair not in known:
            problems.append(f"{where}: 'id' is {pair!r}, which is no pair of {key}.")
        elif verdict is not None and verdict not in _VERDICTS:
            problems.append(f"{where}: 'verdict' is {verdict!r}, expected 'a', 'b', 'tie' or null.")
        elif pair in seen:
            problems.append(f"{where}: there is another verdict on the pair {pair!r} above.")
        elif verdict is not None:
            seen.add(pair)
            counts["tie" if verdict == "tie" else known[pair][verdict]] += 1
    if problems:
        raise FormatError(several(str(verdicts), problems), problems)
    if not seen:
        raise InputError(f"{verdicts} has no verdict yet; fill in 'verdict' with 'a', 'b' or 'tie'.")
    left = len(known) - len(seen)
    note = (f"{left} of {len(known)} pairs have no verdict and are left out.",) if left else ()
    decided = counts[model] + counts[against]
    p_value = _test(counts[model], decided).pvalue if decided else None
    win, tie, lose = (_share(counts[name], len(seen)) for name in (model, "tie", against))
    return VerdictsReport(
        model, against, len(known), len(seen), win, tie, lose, None if p_value is None else float(p_value), note
    )


def _coins(number: int, seed: int) -> list[bool]:
    import numpy as np

    return [bool(coin) for coin in np.random.Generator(np.random.Philox(seed)).integers(0, 2, number)]


def _share(count: int, number: int) -> Tally:
    interval = _test(count, number).proportion_ci(confidence_level=_LEVEL, method="wilson")
    return Tally(count, count / number, float(interval.low), float(interval.high))


def _test(count: int, number: int) -> Any:
    """The binomial test of so many of so many against a half."""
    try:
        return import_module("scipy.stats").binomtest(count, number)
    except ImportError as error:
        raise MissingExtraError("scipy", "eval") from error


def _read_key(path: Path) -> tuple[str, str, Mapping[str, Mapping[str, str]]]:
    try:
        found = json.loads("\n".join(_lines(path)))
        model, against, pairs = found["model"], found["against"], found["pairs"]
        two = {model, against}
        fits = len(two) == 2 and "tie" not in two and pairs
        if fits and all(isinstance(sides, dict) and {sides["a"], sides["b"]} == two for sides in pairs.values()):
            return model, against, pairs
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not the key of a file of pairs; --pairwise writes one.") from error
    raise FormatError(f"{path} is not the key of a file of pairs; --pairwise writes one.")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
