"""What a repository is found by: tags as the Hub writes them, and the words that a search looks through."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.hub.index import parents_in
from surgery.hub.naming import why_not_a_repository

_MOST_TAGS = 512
_MOST_WORDS = 20_000
_LONGEST = 256


def library_of(facts: Mapping[str, object]) -> str | None:
    """The library that loads it: the card's word, else by its kind."""
    named = _card(facts).get("library_name")
    if isinstance(named, str):
        return named
    return {"adapter": "peft", "dense": "transformers", "moe": "transformers"}.get(str(facts.get("kind")))


def pipeline_tag_of(facts: Mapping[str, object]) -> str | None:
    """The task, as the card names it."""
    named = _card(facts).get("pipeline_tag")
    return named if isinstance(named, str) else None


def bases_of(facts: Mapping[str, object]) -> list[str]:
    """What it was made from, as far as names on record could be repositories."""
    found = [parent.source for parent in parents_in(facts)] + _texts(facts.get("base"))
    return list(dict.fromkeys(name for name in found if why_not_a_repository(name) is None))


def tags_of(facts: Mapping[str, object]) -> list[str]:
    """The tags of a repository: those of the card, and what its files say it is and was made from.

    Beside the Hub's own (`base_model:adapter:ID`, `license:mit`) there are `rank:16`, `experts:32` and
    `target:q_proj`.
    """
    card = _card(facts)
    found = dict.fromkeys(_texts(card.get("tags")))
    singles = [library_of(facts), pipeline_tag_of(facts), facts.get("kind"), facts.get("family")]
    method = facts.get("method")
    singles += ["lora", method] if method == "dora" else [method]
    found |= dict.fromkeys(tag for tag in singles if isinstance(tag, str))
    for rank in _numbers(facts.get("ranks")):
        found[f"rank:{rank}"] = None
    for experts in _numbers(facts.get("experts")):
        found[f"experts:{experts}"] = None
    for target in _texts(facts.get("targets")):
        found[f"target:{target}"] = None
    found |= dict.fromkeys(_base_tags(facts))
    for key in ("license", "language", "datasets"):
        prefix = {"license": "license:", "language": "", "datasets": "dataset:"}[key]
        found |= dict.fromkeys(f"{prefix}{value}" for value in _texts(card.get(key)))
    return [tag for tag in found if 0 < len(tag) <= _LONGEST][:_MOST_TAGS]


def _base_tags(facts: Mapping[str, object]) -> list[str]:
    found = []
    recorded = [(parent.source, parent.relation) for parent in parents_in(facts)]
    relation = facts.get("relation")
    for base in _texts(facts.get("base")):
        if base not in (source for source, _ in recorded):
            recorded.append((base, relation if isinstance(relation, str) else "adapter"))
    for source, link in recorded:
        if why_not_a_repository(source) is None:
            found += [f"base_model:{source}", f"base_model:{link}:{source}"]
    return found


def search_words(facts: Mapping[str, object], tags: list[str]) -> str:
    """What a search looks through beside the name."""
    extra = [facts.get("architecture"), facts.get("base"), facts.get("family")]
    words = [*tags, *(word for word in extra if isinstance(word, str))]
    return "\n".join(words).lower()[:_MOST_WORDS]


def _card(facts: Mapping[str, object]) -> Mapping[str, object]:
    card = facts.get("card")
    return card if isinstance(card, dict) else {}


def _texts(value: object) -> list[str]:
    """A text, or each text of a list."""
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, str)]


def _numbers(value: object) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, int) and not isinstance(item, bool)]
