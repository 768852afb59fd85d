"""Blinded pairs of two models' answers and a judge's verdicts on them, to try `surgery verdicts` on.

Writes `judged.jsonl` and `judged.key.json` into the current folder. The questions are sums. One of the models gets
three in four right and the other one in two; the judge can add up, and sees no names.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from surgery.evaluation.pairs import make_pairs

SUMS = 60


def verdict(pair: dict[str, Any]) -> str:
    """Which answer is right: a, b, or both or neither of them."""
    first, second = (int(number) for number in pair["prompt"].split(" + "))
    a, b = (int(pair[side]) == first + second for side in "ab")
    return "tie" if a == b else "a" if a else "b"


def main() -> None:
    """Ask, answer, blind, judge."""
    draw = random.Random(0)
    sums = [(draw.randint(2, 99), draw.randint(2, 99)) for _ in range(SUMS)]
    careful = [str(a + b + (0 if draw.random() < 0.75 else 10)) for a, b in sums]
    hasty = [str(a + b + (0 if draw.random() < 0.5 else 10)) for a, b in sums]
    pairs, key = make_pairs([f"{a} + {b}" for a, b in sums], careful, hasty, ("careful", "hasty"), seed=0)
    judged = [{**pair, "verdict": verdict(pair)} for pair in map(json.loads, pairs.splitlines())]
    Path("judged.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in judged))
    Path("judged.key.json").write_bytes(key)


if __name__ == "__main__":
    main()
