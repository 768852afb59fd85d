"""`push FOLDER NAME[@branch]`: check a folder, and make it the newest commit of a repository.

Every file is read once: hashed, checked and copied in one pass. Nothing is committed unless all of it is in order, and
nothing is ever written to the folder: the card that goes into the commit is the folder's with a section added.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from surgery.errors import InputError, OutputError
from surgery.execute import NoProgress, Progress
from surgery.folder import LocalFolder
from surgery.hub.content import LocalContent, LocalIncoming
from surgery.hub.endpoint import Endpoint
from surgery.hub.facts import stored_facts
from surgery.hub.interfaces import Commit, ConflictError, ContentMissingError, FileEntry
from surgery.hub.naming import MAIN, check_branch, parse_target
from surgery.hub.parcel import CARD, MAX_CARD, DataChecks, Parcel, describe, pack, scan
from surgery.hub.store import Registry, Revision, open_registry, registry_path
from surgery.hub.transfer import Sink
from surgery.source import Source, read_bytes
from surgery.writer import free_bytes

_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How to push.

    Attributes:
        message: of the commit; by default what was pushed.
        private: of a repository that is made by this push, on a Hub.
        allow_nonfinite: let NaN and infinity pass.
        dry_run: check everything, write nothing.
        progress: told about the bytes as they pass.
    """

    message: str | None = None
    private: bool = False
    allow_nonfinite: bool = False
    dry_run: bool = False
    progress: Progress = field(default_factory=NoProgress)


@dataclass(frozen=True)
class PushedFile:
    """A file of the commit; `state` is `added`, `changed`, `same`, or `removed` (of the commit before)."""

    path: str
    size: int
    sha256: str
    state: str


@dataclass(frozen=True)
class PushReport:
    """What `push` did.

    Attributes:
        name: the repository.
        branch: the branch that was moved.
        endpoint: where it is: `local`, or an address.
        commit: id of the commit; None in a dry run.
        created: whether the repository is new.
        unchanged: whether the branch had these very files already, so that nothing was committed.
        files: each file of the commit, and those it no longer has.
        nbytes: size of all files.
        stored_bytes: how much of it was new to the registry; None where a Hub does not say.
        facts: what the folder is: kind, base, ranks and so on.
        card: what became of the card: `written`, `section added`, `section renewed`, or `kept`.
        dry_run: whether nothing was written.
        notes: what is worth saying.
    """

    name: str
    branch: str
    endpoint: str
    commit: str | None
    created: bool
    unchanged: bool
    files: tuple[PushedFile, ...]
    nbytes: int
    stored_bytes: int | None
    facts: Mapping[str, object]
    card: str
    dry_run: bool
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def push(
    folder: str | os.PathLike[str], target: str, endpoint: Endpoint, options: PushOptions, registry: Path | None = None
) -> PushReport:
    """Push a folder to `NAME[@branch]`, in the local registry or on a Hub."""
    name, branch = parse_target(target)
    branch = branch or MAIN
    check_branch(branch)
    place = LocalFolder(folder)
    if endpoint.url is not None:
        from surgery.hub.remote_push import push_remote

        return push_remote(place, name, branch, endpoint.url, options)
    if options.dry_run and not (registry or registry_path()).exists():
        return _report(pack(place, str(name), None), str(name), branch, None, {}, options)
    with open_registry(registry) as store:
        head = store.head(name, branch)
        known = store.metadata.find(name)
        shown = str(known.name if known else name)
        parcel = pack(place, shown, _card_of(store, head))
        if options.dry_run:
            return _report(parcel, shown, branch, head, {}, options)
        return _push_local(store, parcel, shown, branch, options)


def _card_of(store: Registry, head: Revision | None) -> str | None:
    entry = next((entry for entry in head.files if entry.path == CARD), None) if head is not None else None
    if entry is None or entry.size > MAX_CARD or store.content.size(entry.sha256) is None:
        return None
    try:
        return read_bytes(store.content.open(entry.sha256), 0, entry.size).decode()
    except (InputError, UnicodeDecodeError):
        return None


# The local registry ---------------------------------------------------------------------------------------------------


def _push_local(store: Registry, parcel: Parcel, name: str, branch: str, options: PushOptions) -> PushReport:
    repository, _ = parse_target(name)
    created = store.metadata.find(repository) is None
    content = store.content
    assert isinstance(content, LocalContent)
    # Content that another process collects between our finding it and our commit is brought in again.
    for _ in range(_TRIES):
        entries, facts, stored = _ingest(store, content, parcel, name, options)
        store.create(repository, options.private)
        try:
            commit, before = _commit(
                store, repository_name=name, branch=branch, entries=entries, facts=facts, options=options
            )
        except ContentMissingError:
            continue
        return _report(parcel, name, branch, before, entries, options, facts, commit, created, stored)
    raise OutputError(f"The content of {parcel.label} keeps disappearing from {store.root}; is it being cleared?")


def _commit(
    store: Registry,
    *,
    repository_name: str,
    branch: str,
    entries: Mapping[str, FileEntry],
    facts: Mapping[str, object],
    options: PushOptions,
) -> tuple[Commit, Revision | None]:
    """Commit on top of whatever the branch is at. Returns the commit, and what was there before."""
    name, _ = parse_target(repository_name)
    failure: ConflictError | None = None
    for _ in range(_TRIES):
        head = store.head(name, branch)
        files = tuple(sorted(entries.values()))
        if head is not None and head.files == files:
            return head.commit, head
        message = options.message or default_message(facts)
        try:
            return store.commit(name, branch, head.commit.id if head else None, files, message, facts), head
        except ConflictError as error:  # somebody else was quicker: on top of theirs, then
            failure = error
    assert failure is not None
    raise failure


def default_message(facts: Mapping[str, object]) -> str:
    """`Push adapter (extract)`."""
    operation = f" ({facts['operation']})" if facts.get("operation") else ""
    return f"Push {facts['kind']} {'' if facts['kind'] == 'adapter' else 'checkpoint'}".rstrip() + operation


def _ingest(
    store: Registry, content: LocalContent, parcel: Parcel, name: str, options: PushOptions
) -> tuple[dict[str, FileEntry], Mapping[str, object], int]:
    """Bring every file into the store. Returns the entries, the facts, and how many bytes were new."""
    free = free_bytes(store.root)
    needed = sum(source.size for source in parcel.sources.values() if not store.metadata.has_size(source.size))
    if needed > free:
        raise OutputError(
            f"The registry at {store.root} needs {needed:,} bytes for {parcel.label} but its disk has {free:,} free; "
            "free some space, or set SURGERY_REGISTRY to another place."
        )
    checks = DataChecks(parcel, options.allow_nonfinite)
    entries: dict[str, FileEntry] = {}
    stored = 0
    options.progress.start(parcel.nbytes, "pushing")
    try:
        # Weights come first and are kept only when all of them are in order; nothing of a bad folder stays.
        with ExitStack() as stack:
            waiting: list[tuple[LocalIncoming, str]] = []
            pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sync"))
            weights = [path for path in parcel.sources if path.endswith(".safetensors")]
            for path in weights:
                source = parcel.sources[path]
                entries[path], incoming = _bring(store, content, path, source, checks.of(path, source), options, stack)
                if incoming is not None:
                    waiting.append((incoming, entries[path].sha256))
                    pool.submit(incoming.sync)  # an error comes back when it is kept
            facts = checks.facts()
            for incoming, sha256 in waiting:
                stored += 0 if content.touch(sha256) else os.fstat(incoming.fileno()).st_size
                incoming.keep(sha256)
        for path, source in parcel.sources.items():
            if path not in entries:
                with ExitStack() as stack:
                    entries[path], added = _bring(store, content, path, source, [], options, stack)
                    if added is not None:
                        stored += 0 if content.touch(entries[path].sha256) else entries[path].size
                        added.keep(entries[path].sha256)
    finally:
        options.progress.stop()
    known = {entries[path].sha256: hashes for path, hashes in checks.hashes().items()}
    new = {sha256: hashes for sha256, hashes in known.items() if store.metadata.tensor_hashes(sha256) is None}
    if new:
        store.metadata.keep_tensor_hashes(new)
    # As a server reads them, from what is stored; of what is only read here, such as .bin files, what was read.
    read = stored_facts(store.content, store.metadata, sorted(entries.values()), name)
    return entries, {**facts, **read} if "unread" in read else read, stored


def _bring(
    store: Registry,
    content: LocalContent,
    path: str,
    source: Source,
    sinks: Sequence[Sink],
    options: PushOptions,
    stack: ExitStack,
) -> tuple[FileEntry, LocalIncoming | None]:
    """One file: its entry, and the copy that is to be kept; None where the store has that content already.

    A file is copied and hashed in one pass. Only where a file of its length was committed before is it hashed first,
    and copied if it is another after all.
    """
    if store.metadata.has_size(source.size):
        entry = describe(path, source, sinks, options.progress.advance)
        if content.touch(entry.sha256):
            return entry, None
        sinks = []  # they have seen it
    incoming = stack.enter_context(content.receive())
    descriptor = source.fileno()
    shared = descriptor is not None and incoming.clone(descriptor)
    if not shared:
        incoming.reserve(source.size)
        sinks = [*sinks, incoming.write]
    return describe(path, source, sinks, options.progress.advance), incoming


def _report(
    parcel: Parcel,
    name: str,
    branch: str,
    before: Revision | None,
    entries: Mapping[str, FileEntry],
    options: PushOptions,
    facts: Mapping[str, object] | None = None,
    commit: Commit | None = None,
    created: bool = False,
    stored: int = 0,
) -> PushReport:
    entries = entries or scan(parcel, options.allow_nonfinite, options.progress)[0]
    files = changes(entries.values(), before.files if before else ())
    return PushReport(
        name=name,
        branch=branch,
        endpoint="local",
        commit=commit.id if commit else None,
        created=created,
        unchanged=before is not None and all(file.state == "same" for file in files),
        files=files,
        nbytes=parcel.nbytes,
        stored_bytes=stored,
        facts=facts or parcel.found.facts,
        card=parcel.card,
        dry_run=options.dry_run,
        notes=parcel.found.notes,
    )


def changes(after: Iterable[FileEntry], before: Iterable[FileEntry]) -> tuple[PushedFile, ...]:
    """Each file of a commit beside what it was in the one before."""
    found = []
    old = {entry.path: entry for entry in before}
    new = {entry.path: entry for entry in after}
    for path in sorted(old.keys() | new.keys()):
        entry = new.get(path, old.get(path))
        assert entry is not None
        state = "removed" if path not in new else "added" if path not in old else ""
        state = state or ("same" if old[path].sha256 == entry.sha256 else "changed")
        found.append(PushedFile(path, entry.size, entry.sha256, state))
    return tuple(found)
