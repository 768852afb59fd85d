"""Blinded pairs, and the counting of verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.errors import FormatError, InputError
from surgery.evaluation.pairs import make_pairs


def write(folder: Path, number: int = 40, seed: int = 0) -> tuple[Path, Path, list[dict[str, Any]], dict[str, Any]]:
    """Pairs of answers that name their model, so that a judge who peeks can be checked."""
    asked, one, two = ([f"{name} {i}" for i in range(number)] for name in ("question", "left", "right"))
    pairs, key = make_pairs(asked, one, two, ("left", "right"), seed)
    (folder / "p.jsonl").write_bytes(pairs)
    (folder / "p.key.json").write_bytes(key)
    return folder / "p.jsonl", folder / "p.key.json", [json.loads(line) for line in pairs.splitlines()], json.loads(key)


def judge(path: Path, pairs: list[dict[str, Any]], verdicts: list[str | None]) -> Path:
    lines = [json.dumps({**pair, "verdict": verdict}) for pair, verdict in zip(pairs, verdicts, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_pairs_are_blind_and_the_key_tells(tmp_path: Path) -> None:
    """No name, no order to learn; the key names the writer of each side; the seed draws the order."""
    _, _, pairs, key = write(tmp_path)
    sides = [key["pairs"][pair["id"]]["a"] for pair in pairs]
    assert 8 <= sides.count("left") <= 32, "five standard deviations around a fair coin"
    for number, pair in enumerate(pairs):
        assert set(pair) == {"id", "prompt", "a", "b", "verdict"}
        assert pair["prompt"] == f"question {number}"
        who = key["pairs"][pair["id"]]
        assert {side: text.split()[0] for side, text in pair.items() if side in "ab"} == who
    assert write(tmp_path)[2] == pairs
    assert [p["a"] for p in write(tmp_path, seed=1)[2]] != [p["a"] for p in pairs]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["left", "right", "tie", None]), min_size=1, max_size=30).filter(any))
def test_verdicts_are_counted_for_who_wrote(tmp_path_factory: pytest.TempPathFactory, wanted: list[str | None]) -> None:
    """A judge who knows the writers by their words wants these to win; the count says the same."""
    folder = tmp_path_factory.mktemp("pairs")
    _, key, pairs, _ = write(folder, len(wanted))
    said = []
    for who, pair in zip(wanted, pairs, strict=True):
        said.append(who if who in ("tie", None) else next(side for side in "ab" if pair[side].startswith(who)))
    report = surgery.verdicts(judge(folder / "j.jsonl", pairs, said), key=key)
    counts = (report.win.count, report.tie.count, report.lose.count)
    assert counts == tuple(wanted.count(who) for who in ("left", "tie", "right"))
    assert (report.pairs, report.judged) == (len(wanted), sum(counts))
    assert sum(s.share for s in (report.win, report.tie, report.lose)) == pytest.approx(1)
    for share in (report.win, report.tie, report.lose):
        assert 0 <= share.low <= share.share + 1e-12
        assert share.share - 1e-12 <= share.high <= 1
    assert bool(report.notes) == (None in wanted)
    assert (report.p_value is None) == (counts[0] + counts[2] == 0)


def test_intervals_are_wilsons(tmp_path: Path) -> None:
    """8 of 10, by the formula; and the sign test of 8 against 2, by the binomial coefficients."""
    _, key, pairs, known = write(tmp_path, 10)
    side = [{who: s for s, who in known["pairs"][pair["id"]].items()} for pair in pairs]
    verdicts = [side[i]["left" if i < 8 else "right"] for i in range(10)]
    report = surgery.verdicts(judge(tmp_path / "j.jsonl", pairs, verdicts), key=key)
    z, n, p = 1.959963984540054, 10, 0.8
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5,
    )
    assert (report.win.low, report.win.high) == pytest.approx((centre - half, centre + half))
    assert report.p_value == pytest.approx(2 * (45 + 10 + 1) / 1024)


def test_verdicts_that_cannot_be_counted(tmp_path: Path) -> None:
    """Each fault with its line; nothing is counted of a file that has one."""
    file, key, pairs, _ = write(tmp_path, 6)
    with pytest.raises(InputError, match="has no verdict yet; fill in 'verdict' with 'a', 'b' or 'tie'"):
        surgery.verdicts(file, key=key)
    lines = ["{", json.dumps({**pairs[0], "verdict": "A"}), json.dumps({"id": "x-1", "verdict": "a"}), "3"]
    lines += [json.dumps({**pairs[1], "verdict": "a"})] * 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    with pytest.raises(FormatError) as caught:
        surgery.verdicts(bad, key=key)
    assert [problem.removeprefix(f"{bad}, ") for problem in caught.value.problems] == [
        "line 1: not JSON, expected one object to a line.",
        "line 2: 'verdict' is 'A', expected 'a', 'b', 'tie' or null.",
        f"line 3: 'id' is 'x-1', which is no pair of {key}.",
        f"line 4: 'id' is None, which is no pair of {key}.",
        f"line 6: there is another verdict on the pair {pairs[1]['id']!r} above.",
    ]
    with pytest.raises(InputError, match=r"nowhere.jsonl does not exist\."):
        surgery.verdicts(tmp_path / "nowhere.jsonl", key=key)


NO_KEYS = (
    "", "[]", "{}", '{"model": "a", "against": "a", "pairs": {}}', '{"model": "a", "against": "b", "pairs": {"1": 3}}',
    "[" * 9999,
)  # fmt: skip


@pytest.mark.parametrize("key", NO_KEYS, ids=range(len(NO_KEYS)))
def test_keys_that_are_none(key: str, tmp_path: Path) -> None:
    file, place, *_ = write(tmp_path)
    place.write_text(key)
    with pytest.raises(FormatError, match="is not the key of a file of pairs; --pairwise writes one"):
        surgery.verdicts(file, key=place)
