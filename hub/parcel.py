"""What a push sends: a folder that was examined, its card as it will be, and what its data say as they pass.

Nothing here knows where the files go: to the local registry or to a Hub.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import InputError, IntegrityError, NonFiniteError, several
from surgery.execute import Progress
from surgery.folder import WEIGHT_SUFFIXES, LocalFolder
from surgery.header import read_header
from surgery.hub.cards import card
from surgery.hub.examining import Examined, examine
from surgery.hub.interfaces import FileEntry
from surgery.hub.naming import check_paths
from surgery.hub.scanning import TensorScan
from surgery.hub.transfer import Sink, git_blob, lfs_pointer_oid, pump
from surgery.source import BytesSource, FileSource, Source

CARD = "README.md"
# A card of a person beyond this size is not rewritten.
MAX_CARD = 1_000_000
# What the Hub's own .gitattributes names beside weights. Programs count on it: datasets removes a .parquet once it is
# uploaded, and expects it to be no part of the commit itself.
_BINARY = (
    ".7z", ".arrow", ".avi", ".bmp", ".bz2", ".flac", ".gif", ".gz", ".jpeg", ".jpg", ".joblib", ".mlmodel", ".model",
    ".mp3", ".mp4", ".npy", ".ogg", ".parquet", ".pb", ".pickle", ".png", ".rar", ".tar", ".tgz", ".tiff", ".wasm",
    ".wav", ".webm", ".webp", ".xz", ".zip", ".zst",
)  # fmt: skip
LFS_FROM = 10_000_000  # bytes; the Hub keeps larger files in LFS whatever they are
_SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
_KEPT_HIDDEN = {".gitattributes"}


@dataclass(frozen=True)
class Parcel:
    """A folder that was examined and is ready to go: its files by path, weights first, and its card as it will be."""

    folder: LocalFolder
    sources: Mapping[str, Source]
    found: Examined
    card: str

    @property
    def nbytes(self) -> int:
        return sum(source.size for source in self.sources.values())

    @property
    def label(self) -> str:
        return self.folder.label


def pack(folder: LocalFolder, name: str, card_before: str | None) -> Parcel:
    """Find the files of a folder, examine them, and write the card. Raises `InputError` naming all problems.

    `card_before` is the card of the commit before: a person's words in it are kept where the folder has none.
    """
    paths = _files_of(folder)
    check_paths(paths, folder.label)
    found = examine(folder)
    if found.problems:
        raise InputError(_refused(folder.label, found.problems), found.problems)
    readme, what = _readme(folder, paths, card_before)
    if readme is None:
        text, what = None, "kept"
    else:
        text = card(readme, found, name)
        what = "kept" if text == readme else what
    sources: dict[str, Source] = {}
    for path in sorted(paths, key=lambda path: (not path.endswith(".safetensors"), path)):
        sources[path] = folder.open(path)
    if text is not None:
        sources[CARD] = BytesSource(f"{folder.label}/{CARD}", text.encode())
    return Parcel(folder, sources, found, what)


def _refused(label: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{label} is not fit to be pushed: {problems[0]}"
    return f"{label} is not fit to be pushed, for {len(problems)} reasons:"


def _files_of(folder: LocalFolder) -> list[str]:
    """Every file, the folders of undo records included, without hidden ones and caches."""
    found = []
    for parent, folders, files in os.walk(folder.path, onerror=_unreadable):
        here = Path(parent).relative_to(folder.path)
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        if linked:
            raise InputError(
                f"{folder.label}/{(here / linked[0]).as_posix()} is a link to a folder; copy that folder here, or "
                "leave it out."
            )
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        for name in files:
            path = (here / name).as_posix()
            if name.startswith(".") and path not in _KEPT_HIDDEN:
                continue
            if not folder.stays_inside(path):
                raise InputError(f"{folder.label}/{path} is a link out of the folder, or no file; copy the file here.")
            found.append(path)
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _readme(folder: LocalFolder, paths: Sequence[str], before: str | None) -> tuple[str | None, str]:
    """The card to add a section to, and what that will be called; None for one that is to be left alone."""
    from surgery.card import BEGIN, written_by_a_person

    text = ""
    if CARD in paths:
        path = folder.path / CARD
        if path.stat().st_size > MAX_CARD:
            return None, "kept"
        try:
            # newline="": a person's line ends stay as they are.
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read()
        except UnicodeDecodeError:
            return None, "kept"
    if before is not None and not written_by_a_person(text) and written_by_a_person(before):
        text = before
    return text, "section renewed" if BEGIN in text else "section added" if text.strip() else "written"


class DataChecks:
    """What the data say, gathered while they pass."""

    def __init__(self, parcel: Parcel, allow_nonfinite: bool) -> None:
        self._parcel = parcel
        self._allow_nonfinite = allow_nonfinite
        self._scans: dict[str, TensorScan] = {}

    def of(self, path: str, source: Source) -> list[Sink]:
        """The sinks that a file's bytes have to pass."""
        if path not in self._parcel.found.files.weights.names or not path.endswith(".safetensors"):
            return []
        self._scans[path] = TensorScan(read_header(source))
        return [self._scans[path].update]

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """The hash of each tensor, by path of its file."""
        return {path: passed.hashes for path, passed in self._scans.items()}

    def facts(self) -> Mapping[str, object]:
        """The facts, with the one hash of all weights. Raises what is wrong with the data."""
        from surgery.belonging import weights_id

        hashes: dict[str, str] = {}
        bad: list[str] = []
        for passed in self._scans.values():
            hashes |= passed.hashes
            bad += passed.nonfinite
        label, found = self._parcel.label, self._parcel.found
        if bad and not self._allow_nonfinite:
            problems = [f"{label}: tensor {name!r} holds NaN or infinity." for name in bad]
            raise NonFiniteError(
                f"{label} is not fit to be pushed: {len(bad)} of its tensors, {bad[0]!r} first, hold NaN or infinity; "
                "--allow-nonfinite lets them pass.",
                problems,
            )
        expected = found.expected_hashes
        other = [name for name, digest in hashes.items() if expected.get(name, digest) != digest]
        if other:
            problems = [
                f"{label}: tensor {name!r} does not have the hash that surgery.json has on record." for name in other
            ]
            raise IntegrityError(several(f"{label}, which is not what its surgery.json says", problems), problems)
        return {**found.facts, "weights": weights_id(hashes)} if hashes else found.facts


def scan(
    parcel: Parcel, allow_nonfinite: bool, progress: Progress
) -> tuple[dict[str, FileEntry], Mapping[str, object]]:
    """Read and check every file, and write nothing. Returns the entries by path, and the facts."""
    checks = DataChecks(parcel, allow_nonfinite)
    progress.start(parcel.nbytes, "checking")
    try:
        entries = {
            path: describe(path, source, checks.of(path, source), progress.advance)
            for path, source in parcel.sources.items()
        }
    finally:
        progress.stop()
    return entries, checks.facts()


def describe(path: str, source: Source, sinks: Sequence[Sink], advance: Callable[[int], None]) -> FileEntry:
    """The entry of a file, whose bytes pass all `sinks` on the way."""
    sha256 = hashlib.sha256()
    lfs = is_lfs(path, source.size)
    sha1 = None if lfs else git_blob(source.size)
    pump(source, [sha256.update, *([sha1.update] if sha1 is not None else []), *sinks], advance)
    if isinstance(source, FileSource):
        source.check_unchanged()
    digest = sha256.hexdigest()
    oid = lfs_pointer_oid(digest, source.size) if sha1 is None else sha1.hexdigest()
    return FileEntry(path, source.size, digest, oid, lfs)


def is_lfs(path: str, size: int) -> bool:
    """Whether git would keep a file in LFS: weights, packed and binary data, and whatever is large."""
    return size > LFS_FROM or (path.endswith((*WEIGHT_SUFFIXES, *_BINARY)) and not path.endswith(".json"))
