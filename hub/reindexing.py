"""`hub reindex`: examine commits again, whose facts an earlier version wrote or whose tensors nobody has hashed yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from surgery.errors import InputError, SurgeryError
from surgery.execute import NoProgress, Progress
from surgery.hub.facts import FACTS_VERSION, stored_facts
from surgery.hub.naming import RepositoryName
from surgery.hub.passing import PassingTensors
from surgery.hub.store import Registry, existing_registry, registry_path
from surgery.hub.transfer import pump


@dataclass(frozen=True)
class ReindexReport:
    """What `hub reindex` did.

    Attributes:
        registry: its folder.
        examined: commits that were looked into.
        changed: those of which more, or something else, is known now.
        failed: what could not be examined, as sentences.
    """

    registry: str
    examined: int
    changed: int
    failed: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def reindex(root: Path | None = None, everything: bool = False, progress: Progress | None = None) -> ReindexReport:
    """Examine the newest commit of every branch and tag whose facts are of an earlier version, or every one of them.

    Tensors whose hashes are not known are read and hashed.
    """
    place = root or registry_path()
    store = existing_registry(root, writable=True)
    if store is None:
        raise InputError(f"There is no registry at {place}.")
    shown = progress or NoProgress()
    failed, changed = [], 0
    with store:
        found = store.metadata.outdated(FACTS_VERSION + everything)
        shown.start(sum(_unhashed(store, name, commit) for name, commit in found), "hashing")
        try:
            for name, commit in found:
                try:
                    changed += complete(store, name, commit, shown.advance)
                except SurgeryError as error:  # of one repository; the others go on
                    failed.append(error.message)
        finally:
            shown.stop()
    return ReindexReport(str(place), len(found), changed, tuple(failed))


def earlier_notes(registry: Registry) -> tuple[str, ...]:
    """What is to be said beside an answer that rests on facts: that some were written by an earlier version.

    Such facts name fewer parents and no shapes, so that relatives and adapters that fit may be missing. Repositories
    without a file have nothing to examine.
    """
    found = registry.metadata.outdated(FACTS_VERSION)
    names = {name for name, commit in found if registry.find(name, commit).files}
    if not names:
        return ()
    count = "1 repository was" if len(names) == 1 else f"{len(names)} repositories were"
    return (f"{count} examined by an earlier version, so something may be missing here; run `surgery hub reindex`.",)


def complete(
    registry: Registry, name: RepositoryName, commit: str, advance: Callable[[int], None] = lambda _: None
) -> bool:
    """Examine a commit, and hash those tensors of it that nobody has hashed. Whether its facts are other ones now."""
    found = registry.find(name, commit)
    for entry in found.files:
        if entry.path.endswith(".safetensors") and registry.metadata.tensor_hashes(entry.sha256) is None:
            source = registry.content.open(entry.sha256)
            passing = PassingTensors(source.size)
            pump(source, [passing.update], advance)
            if (hashes := passing.hashes) is not None:
                registry.metadata.keep_tensor_hashes({entry.sha256: hashes})
    facts = stored_facts(registry.content, registry.metadata, found.files, str(found.repository.name))
    if facts == found.commit.facts:
        return False
    registry.metadata.set_facts(found.repository.name, found.commit.id, facts)
    return True


def _unhashed(registry: Registry, name: RepositoryName, commit: str) -> int:
    """Bytes that have to be read."""
    weights = [entry for entry in registry.find(name, commit).files if entry.path.endswith(".safetensors")]
    return sum(entry.size for entry in weights if registry.metadata.tensor_hashes(entry.sha256) is None)
