"""How long a registry of many repositories takes to answer a list, a search, a filter and a lineage. Prints JSON.

    python -m benchmarks.hub_lists FOLDER [REPOSITORIES]

Three of four repositories are adapters, each of some base; one of ten is private. Each question is asked by a member of
one namespace, five times, of the index alone; the fastest time counts, in ms, beside how many models it found.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sized
from pathlib import Path

from surgery.hub.facts import FACTS_VERSION
from surgery.hub.index import ModelQuery, Reader, Span, made_from
from surgery.hub.interfaces import Commit, FileEntry
from surgery.hub.lineage import lineage
from surgery.hub.metadata import SqliteMetadata
from surgery.hub.naming import RepositoryName
from surgery.hub.store import tree_id

PAGE = 100
_GROUP = 100  # repositories around one base


def name_of(number: int) -> RepositoryName:
    return RepositoryName(f"user{number % 500}", f"model-{number}")


def fill(metadata: SqliteMetadata, count: int) -> None:
    """Make the repositories, each with one commit of four files."""
    rng = random.Random(0)
    for number in range(count):
        name = name_of(number)
        facts: dict[str, object] = {
            "version": FACTS_VERSION, "parameters": rng.randrange(10**5, 10**10), "dtype": "F32",
            "weights": f"{number:064x}", "card": {"tags": ["text-generation"], "license": "mit"},
        }  # fmt: skip
        if number % 4:
            base = str(name_of(number // _GROUP * _GROUP))
            facts |= {
                "kind": "adapter", "method": "lora", "ranks": [rng.choice([4, 8, 16, 32, 64])], "base": base,
                "targets": ["q_proj", "v_proj"], "shapes": ["4096x1024", "4096x4096"], "relation": "adapter",
                "parents": [{"source": base, "role": "base", "relation": "adapter"}],
            }  # fmt: skip
        else:
            facts |= {"kind": "dense", "family": "llama", "architecture": "LlamaForCausalLM"}
        entries = [FileEntry(f"f{n}", number + n, f"{4 * number + n:064x}", "0" * 40, True) for n in range(4)]
        seconds = 10**9 + rng.randrange(10**6)
        commit = Commit(f"{number:040x}", None, tree_id(entries), "message", seconds, facts)
        metadata.create(name, "model", number % 10 == 9, seconds)
        metadata.commit(name, "main", None, commit, entries, lambda _: [])


def questions(metadata: SqliteMetadata, count: int) -> dict[str, Callable[[], Sized]]:
    reader = Reader(namespaces=frozenset({"user1"}))
    base = name_of(count // 2 // _GROUP * _GROUP)

    def page(**query: object) -> Callable[[], Sized]:
        return lambda: metadata.select(ModelQuery(**{"limit": PAGE, **query}), reader)  # type: ignore[arg-type]  # keywords of a table

    def lineage_of() -> Sized:
        found = lineage(metadata, base, reader)
        assert found is not None
        return found.nodes

    return {
        "first page": page(),
        "page in the middle": page(begin=count // 2),
        "page of 1000": page(limit=1000),
        "by name": page(sort="name"),
        "by parameters": page(sort="parameters"),
        "search that finds some": page(search=("model-1",)),
        "search that finds nothing": page(search=("nothing",)),
        "tag": page(tags=("lora",)),
        "rank and target": page(ranks=Span(8, 16), targets=("q_proj",)),
        "parameters": page(parameters=Span(10**9, 2 * 10**9)),
        "author": page(author="user7"),
        "base": lambda: metadata.select(ModelQuery(made_from=(made_from(metadata, base, reader),)), reader),
        "shapes that fit": page(shapes=("4096x1024", "4096x4096")),
        "shapes that nothing fits": page(shapes=("8x8",)),
        "count": lambda: range(metadata.count(ModelQuery(kind="adapter"), reader)),
        "lineage of a base": lineage_of,
    }


def measure(question: Callable[[], Sized]) -> dict[str, float]:
    best, found = float("inf"), 0
    for _ in range(5):
        begin = time.perf_counter()
        found = len(question())
        best = min(best, time.perf_counter() - begin)
    return {"ms": round(best * 1000, 2), "found": found}


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    folder.mkdir(parents=True, exist_ok=True)
    metadata = SqliteMetadata(folder / "registry.sqlite")
    # Filling is not what is measured: a crash may cost the file.
    metadata._db.execute("PRAGMA synchronous = OFF")
    fill(metadata, count)
    results = {title: measure(question) for title, question in questions(metadata, count).items()}
    print(json.dumps({"repositories": count, "results": results}, indent=1))
    metadata.close()


if __name__ == "__main__":
    main()
