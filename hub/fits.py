"""Does an adapter fit a base? By hash where hashes are on record, else by shape; if not, which module, and why.

    yes, by hash      every tensor that the adapter changes is, bit for bit, the one it was made for
    yes, by shape     every factor finds its place, and the tensors are other ones, or nobody can tell
    no                a module is missing or has another shape
    unknown           the adapter is of a kind that is not understood, or one of the two cannot be read

Headers are enough, but for one thing: where the base's hashes are not known and the adapter has its base's on record, a
few of the smallest tensors are read and hashed, so that another base of the same shapes is told from the right one.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from surgery.adapter import Adapter, read_adapter
from surgery.belonging import judge, recorded_hashes
from surgery.checkpoint import Checkpoint, read_checkpoint
from surgery.errors import InputError, MismatchError, SurgeryError, UnsupportedError
from surgery.folder import Folder
from surgery.hashing import hash_tensor
from surgery.hub.facts import FACTS_VERSION, BoundedFolder
from surgery.hub.index import Entry, ModelQuery, Reader
from surgery.hub.interfaces import Commit
from surgery.hub.server.content_folder import ContentFolder
from surgery.hub.store import Registry, Revision
from surgery.ops.fitting import fit
from surgery.provenance import read_provenance

YES, NO, UNKNOWN = "yes", "no", "unknown"
HASH, SHAPE = "hash", "shape"
_MOST_REASONS = 20
# What may be read to look at tensors whose hashes are not known: so many, and so many bytes in all.
_PROBED = 4
_PROBED_BYTES = 16_000_000
_MOST_READ = 48_000_000
# Each pattern of a config is tried with each module.
_MOST_MATCHES = 1_000_000


@dataclass(frozen=True)
class Fit:
    """Whether an adapter fits a base.

    Attributes:
        adapter, base: what they are called.
        fits: `yes`, `no` or `unknown`.
        by: `hash` or `shape`; None where nobody can tell.
        reasons: one sentence each; of a `no`, every module that has no place.
        changed: how many tensors of the base it changes.
        equal, different: how many of these are those on record, and how many are others.
    """

    adapter: str
    base: str
    fits: str
    by: str | None
    reasons: tuple[str, ...]
    changed: int = 0
    equal: int = 0
    different: int = 0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def fit_of(registry: Registry, adapter: Revision, base: Revision) -> Fit:
    """Whether one commit of a registry fits another. Who may read both is for the caller to see."""
    sums = {entry.path: entry.sha256 for entry in base.files}
    folders = [ContentFolder(registry.content, found.files, str(found.repository.name)) for found in (adapter, base)]
    return check_fit(folders[0], folders[1], lambda path: registry.metadata.tensor_hashes(sums[path]))


def fitting(registry: Registry, query: ModelQuery, base: Revision, reader: Reader) -> list[Entry]:
    """The adapters of a query that fit a base: by the shapes in the index first, and then each by its headers.

    Raises `InputError` for a base whose shapes are not known.
    """
    chosen = replace(query, shapes=shapes_of(base))
    return [entry for entry in registry.metadata.select(chosen, reader) if does_fit(registry, entry, base)]


def shapes_of(base: Revision) -> tuple[str, ...]:
    """The shapes of a base's weights, from its facts. Raises `InputError` where they are not known."""
    shapes = base.commit.facts.get("shapes")
    if not isinstance(shapes, list):
        version = base.commit.facts.get("version")
        if base.files and (not isinstance(version, int) or version < FACTS_VERSION):
            raise InputError(
                f"{base.repository.name} was examined by an earlier version, which did not look at shapes; "
                "`surgery hub reindex` looks again."
            )
        raise InputError(f"Nothing is known of the shapes of {base.repository.name}; is it a checkpoint?")
    return tuple(shape for shape in shapes if isinstance(shape, str))


def does_fit(registry: Registry, entry: Entry, base: Revision) -> bool:
    """Whether the newest commit of an entry fits a base."""
    adapter = head_of(registry, entry)
    return adapter is not None and remembered_fit(registry, adapter, base).fits == YES


def head_of(registry: Registry, entry: Entry) -> Revision | None:
    """The newest commit of an entry, with its files."""
    if entry.commit is None or entry.tree is None:
        return None
    commit = Commit(entry.commit, None, entry.tree, "", entry.repository.updated, entry.facts)
    return Revision(entry.repository, commit, tuple(registry.metadata.files(entry.tree)))


_remembered: OrderedDict[tuple[str, ...], Fit] = OrderedDict()
_MOST_REMEMBERED = 2048


def remembered_fit(registry: Registry, adapter: Revision, base: Revision) -> Fit:
    """`fit_of`, once for each pair of trees: they never change."""
    names = (str(adapter.repository.name), str(base.repository.name))
    weights = (str(adapter.commit.facts.get("weights")), str(base.commit.facts.get("weights")))
    key = (adapter.commit.tree, base.commit.tree, *names, *weights)
    if (found := _remembered.get(key)) is None:
        found = _remembered[key] = fit_of(registry, adapter, base)
        while len(_remembered) > _MOST_REMEMBERED:
            with contextlib.suppress(KeyError):  # another thread was quicker
                _remembered.popitem(last=False)
    return found


def check_fit(adapter: Folder, base: Folder, hashes: Callable[[str], Mapping[str, str] | None] | None = None) -> Fit:
    """Whether the adapter in one folder fits the checkpoint in another. Never raises for what is in them.

    Args:
        adapter: with `adapter_config.json`.
        base: a checkpoint.
        hashes: gives the BLAKE3-256 of the tensors of a file of `base` where they are known.
    """
    small, large = BoundedFolder(adapter, _MOST_READ), BoundedFolder(base, _MOST_READ)
    names = (adapter.label, base.label)
    try:
        factors, checkpoint = _open_adapter(small), _open_base(large)
        changed = _changed(factors, checkpoint)
        return _verdict(names, factors, checkpoint, changed, hashes)
    except MismatchError as error:
        reasons = error.problems or (error.message,)
        more = len(reasons) - _MOST_REASONS
        shown = reasons[:_MOST_REASONS] if more <= 0 else (*reasons[:_MOST_REASONS], f"... and {more} more.")
        return Fit(*names, NO, SHAPE, tuple(shown))
    except SurgeryError as error:
        return Fit(*names, UNKNOWN, None, tuple(error.problems[:_MOST_REASONS]) or (error.message,))
    except Exception as error:  # a stranger's config may trip what trusts one; whoever asks is told, and no more
        return Fit(*names, UNKNOWN, None, (f"One of the two cannot be understood ({type(error).__name__}).",))


def _open_adapter(folder: Folder) -> Adapter:
    adapter = read_adapter(folder)
    patterns = [adapter.config.get(key) for key in ("rank_pattern", "alpha_pattern")]
    count = sum(len(found) for found in patterns if isinstance(found, dict))
    if count * len(adapter.loras) > _MOST_MATCHES:
        raise UnsupportedError(
            f"{folder.label} has {count} patterns for {len(adapter.loras)} modules, too many to try."
        )
    return adapter


def _open_base(folder: Folder) -> Checkpoint:
    names = set(folder.names())
    if "adapter_config.json" in names and not any(name.startswith("model") for name in names):
        raise MismatchError(f"{folder.label} is an adapter itself, and no base.")
    return read_checkpoint(folder)


def _changed(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Tensors of the base that the adapter changes. Raises `MismatchError` where it does not fit."""
    changes = fit(base, [adapter], base_hash=None)
    # A tensor that the adapter brings under the wrapper's own key is PEFT's copy of the base's.
    return [
        name
        for name, change in changes.items()
        if change.base is not None and (change.blocks or change.rows or ".base_layer." not in change.start.name)
    ]


def _verdict(
    names: tuple[str, str],
    adapter: Adapter,
    base: Checkpoint,
    changed: list[str],
    hashes: Callable[[str], Mapping[str, str] | None] | None,
) -> Fit:
    recorded, source = recorded_hashes(read_provenance(adapter.files.folder), "base")
    count = len(changed)
    if not changed:
        return Fit(*names, YES, SHAPE, ("It changes no tensor of the base, and only adds to them.",))
    placed = f"All {count} tensors that it changes have the right shape"
    if not recorded:
        return Fit(*names, YES, SHAPE, (f"{placed}; it has no hashes of its base on record.",), count)
    known = _known(base, hashes)
    if not known:
        chosen = _smallest(base, [name for name in changed if name in recorded])
        known = {name: hash_tensor(base.tensors[name]) for name in chosen}
    found = judge(recorded, changed, known.get, source)
    counts = (count, len(found.equal), len(found.different))
    if found.proved:
        return Fit(*names, YES, HASH, (f"All {count} tensors that it changes are those it was made for.",), *counts)
    if found.refuted:
        reason = (
            f"{names[1]} is another model than {source}, which it was made for: {placed[0].lower()}{placed[1:]}, but "
            f"{len(found.different)} of them, {found.different[0]!r} first, are not those on record."
        )
        return Fit(*names, YES, SHAPE, (reason, *_ancestor(base, recorded, changed, source)), *counts)
    seen = f"{len(found.equal)} of them are those it was made for, and of the others" if found.equal else "of these"
    return Fit(*names, YES, SHAPE, (f"{placed}; {seen} the hashes are not known.",), *counts)


def _known(base: Checkpoint, hashes: Callable[[str], Mapping[str, str] | None] | None) -> Mapping[str, str]:
    """The hashes of a base's tensors that the registry took itself. What its `surgery.json` says is its own word."""
    found: dict[str, str] = {}
    for name in base.weights.names:
        found |= (hashes(name) if hashes is not None else None) or {}
    return found


def _smallest(base: Checkpoint, names: list[str]) -> list[str]:
    ordered = sorted(names, key=lambda name: (base.tensors[name].nbytes, name))[:_PROBED]
    return [name for name in ordered if base.tensors[name].nbytes <= _PROBED_BYTES // _PROBED]


def _ancestor(base: Checkpoint, recorded: Mapping[str, str], changed: list[str], source: str | None) -> tuple[str, ...]:
    """What to say where the base was itself made from the one on record."""
    ancestors, _ = recorded_hashes(read_provenance(base.folder), "base")
    if ancestors and judge(recorded, changed, ancestors.get).proved:
        return (f"It was itself made from {source}, so the adapter is of its family.",)
    return ()
