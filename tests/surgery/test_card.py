"""Cards: the tool's section comes and goes, and a person's words stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.card import BEGIN, END, with_section, written_by_a_person

FRONT = {"base_model": "lab/base", "tags": ["lora"]}
SECTION = f"{BEGIN}\n\nwhat it is\n\n{END}\n"


def test_an_empty_card_is_front_matter_and_section() -> None:
    made = with_section("", "what it is", FRONT)
    assert made == f"---\nbase_model: lab/base\ntags:\n- lora\n---\n\n{SECTION}"
    assert not written_by_a_person(made)


def test_a_section_is_added_at_the_end_and_renewed_where_it_stands() -> None:
    first = with_section("# Mine\n\nText.\n", "what it is", {})
    assert first == f"# Mine\n\nText.\n\n{SECTION}"
    assert with_section(first + "\nAfter.\n", "renewed", {}) == (
        f"# Mine\n\nText.\n\n{BEGIN}\n\nrenewed\n\n{END}\n\nAfter.\n"
    )


def test_front_matter_of_a_person_is_added_to_and_never_changed() -> None:
    card = "---\nlicense: mit\nbase_model: other/base  # mine\n---\n\n# Mine\n"
    assert with_section(card, "what it is", FRONT) == (
        f"---\nlicense: mit\nbase_model: other/base  # mine\ntags:\n- lora\n---\n\n# Mine\n\n{SECTION}"
    )


@pytest.mark.parametrize("card", ["---\nnever: ends\n\n# Mine\n", "----\nnot front matter\n"])
def test_front_matter_that_is_none_is_left_alone(card: str) -> None:
    assert with_section(card, "what it is", FRONT).startswith(card.rstrip())


def test_values_that_yaml_would_misread_are_quoted() -> None:
    assert 'base_model: "no: \\"way\\""\n' in with_section("", "x", {"base_model": 'no: "way"'})


WORDS = st.text(st.sampled_from("ab\n -#:<!>é\r\t"), max_size=60)


@given(WORDS, WORDS)
def test_a_persons_words_stay_and_twice_is_once(before: str, front: str) -> None:
    """Whatever stands in the card, line ends and spaces included; only empty space at its very end may go."""
    card = f"---\n{front}\n---\n{before}" if "---" not in front else before
    once = with_section(card, "what it is", FRONT)
    assert once.count(SECTION) == 1
    assert with_section(once, "what it is", FRONT) == once
    kept = once.replace(SECTION, "")
    for line in before.split("\n"):
        assert line.strip() in kept
    assert before.strip() in kept
    assert written_by_a_person(once) == written_by_a_person(card)
