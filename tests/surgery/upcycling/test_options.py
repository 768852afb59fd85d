"""The small languages of `upcycle`: layers, initialisations, routers, and what does not go together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import OptionError
from surgery.upcycling.options import (
    ExpertInit,
    RouterInit,
    UpcycleOptions,
    parse_init,
    parse_layers,
    parse_router_init,
)
from tests.surgery.upcycling.dense import stored, upcycled


@given(st.integers(1, 200))
def test_all_layers_and_the_last_half(depth: int) -> None:
    assert parse_layers("all", depth) == tuple(range(depth))
    half = parse_layers("last:half", depth)
    assert half == tuple(range(depth))[-max(1, depth // 2) :]


@given(st.integers(1, 200).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_the_last_and_every_so_many(given_: tuple[int, int]) -> None:
    depth, count = given_
    assert parse_layers(f"last:{count}", depth) == tuple(range(depth))[-count:]
    every = parse_layers(f"every:{count}", depth)
    assert every[-1] == depth - 1
    assert every[0] < count
    assert all(later - earlier == count for earlier, later in pairwise(every))


@given(
    st.integers(1, 60).flatmap(lambda depth: st.tuples(st.just(depth), st.sets(st.integers(0, depth - 1), min_size=1)))
)
def test_a_list_of_layers(given_: tuple[int, set[int]]) -> None:
    depth, layers = given_
    assert parse_layers(",".join(map(str, layers)), depth) == tuple(sorted(layers))


@given(st.text(max_size=12))
def test_layers_are_parsed_or_refused(text: str) -> None:
    try:
        layers = parse_layers(text, 12)
    except OptionError:
        return
    assert all(0 <= layer < 12 for layer in layers)


@given(st.text(max_size=20))
def test_initialisations_are_parsed_or_refused(text: str) -> None:
    for parse in (parse_init, parse_router_init):
        try:
            found: Any = parse(text)
        except OptionError:
            continue
        assert isinstance(found, ExpertInit | RouterInit)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("copy", ExpertInit("copy")),
        ("noise:0.001", ExpertInit("noise", 0.001)),
        ("noise:1%", ExpertInit("noise", 0.01, relative=True)),
        ("noise:1e-3", ExpertInit("noise", 0.001)),
        ("drop:.5", ExpertInit("drop", 0.5)),
        ("granular:8", ExpertInit("granular", groups=8)),
        ("from:a,b/c", ExpertInit("from", paths=("a", "b/c"))),
        ("adapters:a=0.5,b", ExpertInit("adapters", paths=("a=0.5", "b"))),
    ],
)
def test_initialisations(text: str, expected: ExpertInit) -> None:
    assert parse_init(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal", RouterInit("normal", 0.02)),
        ("normal:0.5", RouterInit("normal", 0.5)),
        ("zeros", RouterInit("zeros")),
        ("hidden:p.jsonl", RouterInit("hidden", path="p.jsonl")),
    ],
)
def test_router_initialisations(text: str, expected: RouterInit) -> None:
    assert parse_router_init(text) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"experts": 1}, "--experts is 1, expected at least 2."),
        ({"experts": 4, "top_k": 5}, "--top-k is 5, expected at most the 4 experts."),
        ({"top_k": 0}, "--top-k is 0, expected at least 1."),
        ({"layers": "last:4"}, "--layers is 'last:4', but the model has 3 layers; choose at most that many."),
        ({"layers": "0,7"}, "--layers names layer 7, but the model has the layers 0 to 2; layers count from zero."),
        ({"layers": "2-1"}, "--layers has the range '2-1', expected the smaller number first."),
        (
            {"layers": "top"},
            "--layers is 'top', expected all, last:N, last:half, every:N, or layers such as 0,4-7.",
        ),
        ({"layers": "encoder=all"}, "--layers speaks of the encoder, but the model has only a decoder."),
        ({"init": "granular:5"}, "--init is granular:5, but the intermediate size 48 does not divide by it."),
        (
            {"init": "granular:4", "experts": 10},
            "--experts is 10, expected a multiple of 4, at least 8: with --init granular:4 it counts small experts.",
        ),
        (
            {"init": "granular:4", "experts": 8, "top_k": 2},
            "--top-k is 2, expected a multiple of 4: with --init granular:4 a token needs all parts of a copy.",
        ),
        (
            {"init": "noise:-1"},
            "--init is 'noise:-1', expected copy, noise:STD (or noise:1%), drop:RATIO (up to 1), granular:G (2 or "
            "more), from:CHECKPOINT,CHECKPOINT,... or adapters:ADAPTER,ADAPTER,...",
        ),
        ({"init": "from:a"}, "--init is 'from:a', expected at least two paths after 'from', separated by commas."),
        ({"router_init": "ones"}, "--router-init is 'ones', expected normal:STD, zeros or hidden:PROMPTS.jsonl."),
        ({"router": "switch"}, "--router is 'switch', expected one of top-k, expert-choice."),
        ({"experts": 4097}, "--experts is 4097, expected at most 4096."),
        (
            {"group": "batch"},
            "--group batch goes with --router expert-choice; a top-k router sees one token at a time.",
        ),
        (
            {"allow_future": True},
            "--allow-future goes with --router expert-choice; a top-k router sees one token at a time.",
        ),
        ({"capacity": 2.0}, "--capacity goes with --router expert-choice; a top-k router drops no token."),
        (
            {"router": "expert-choice", "top_k": 2},
            "--top-k goes with --router top-k; expert choice has --capacity.",
        ),
        (
            {"router": "expert-choice"},
            "--router expert-choice in a decoder lets each token's experts depend on the tokens after it, so that "
            "training sees the future and generation does not; use top-k, or pass --allow-future.",
        ),
        ({"rest": "first"}, "--rest goes with --init from:... or adapters:..., where there are several models."),
        ({"target": "phixtral"}, "--target is 'phixtral', expected auto, mixtral, glm4_moe,"),
        ({"combine": "sum"}, "--combine is 'sum', expected one of normalized, raw."),
        ({"kind": "adapter"}, "--kind is 'adapter', expected one of copy, lora."),
        ({"rank": 8}, "--rank goes with --kind lora; a copy of the MLP has full rank."),
        ({"alpha": 8.0}, "--alpha goes with --kind lora; a copy of the MLP has full rank."),
        ({"kind": "lora", "rank": 0}, "--rank is 0, expected at least 1."),
        ({"kind": "lora", "alpha": -1.0}, "--alpha is -1, expected more than 0."),
        *(
            (
                {"kind": "lora", "init": init},
                f"--init {init} goes with --kind copy; updates of low rank start out as zero, over one MLP.",
            )
            for init in ("noise:1%", "drop:0.5", "granular:2", "from:a,b", "adapters:a,b")
        ),
        (
            {"kind": "lora", "shared_expert": True},
            "--shared-expert goes with --kind copy; the one MLP under the updates sees every token.",
        ),
        (
            {"kind": "lora", "target": "mixtral"},
            "--target mixtral goes with --kind copy; routed LoRA experts are in no format of transformers, so their "
            "code is shipped.",
        ),
        (
            {"kind": "lora", "shard_bytes": 10**9},
            "--shard-size goes with --kind copy; routers and updates are one small file.",
        ),
        ({"group": "token"}, "--group is 'token', expected sequence or batch."),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    dense = stored(tmp_path, "llama")
    with pytest.raises(OptionError) as caught:
        upcycled(dense, tmp_path / "moe", **options)
    assert str(caught.value).startswith(sentence)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-float32"]


def test_a_name_for_the_output() -> None:
    """Options are hashable and print themselves: they are part of what tells one work from another."""
    assert hash(UpcycleOptions(experts=8)) == hash(UpcycleOptions(experts=8))
    assert repr(UpcycleOptions(experts=8)) != repr(UpcycleOptions(experts=16))
