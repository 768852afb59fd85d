"""Files: folders, and what is in a file, as far as it can be shown without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import parse_qs

from starlette.responses import Response

from surgery.errors import SurgeryError
from surgery.hub.interfaces import FileEntry
from surgery.hub.server.files import below, last_commits
from surgery.hub.server.front_matter import CARD
from surgery.hub.server.pages import tensors
from surgery.hub.server.pages.render import html, pretty
from surgery.hub.server.pages.repository import common
from surgery.hub.server.pages.session import Visit
from surgery.hub.server.web import HttpError, page, unquoted
from surgery.hub.store import Revision
from surgery.source import Source, read_bytes

# Bytes of a text that are shown.
MAX_TEXT = 256 << 10
_MOST_FILES = 500
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_MAX_IMAGE = 20 << 20
_NO_TEXT = "This file is not text, and is not shown here."


@dataclass(frozen=True)
class View:
    """What is shown of a file: its tensors, an image, a text, or only a sentence.

    Attributes:
        note: what to know of the text.
        cut: whether the text is only the beginning.
    """

    sentence: str = ""
    tensors: tensors.TensorPage | None = None
    image: bool = False
    text: str = ""
    note: str = ""
    cut: bool = False


def _at(visit: Visit, files: bool) -> tuple[Revision, str, str]:
    """The commit, and revision and path as the address has them.

    With `files` what is in them is read: of a gated repository only who was let in does, but for its card.
    """
    revision, path = unquoted(visit.call.rest[0]), unquoted("/".join(visit.call.rest[1:])).strip("/")
    return visit.call.revision(revision, files and path != CARD), revision, path


def _steps(path: str) -> list[tuple[str, str]]:
    """Each folder on the way to a path, by its name and its own path."""
    parts = path.split("/") if path else []
    return [(part, "/".join(parts[: number + 1])) for number, part in enumerate(parts)]


def tree(visit: Visit) -> Response:
    """`/{id}/tree/{revision}[/{path}]`: a folder."""
    found, revision, path = _at(visit, files=False)
    begin, _ = page(parse_qs(visit.call.request.url.query))
    listed = below(found.files, path, recursive=False)
    if path and (not listed or listed[0] == next((e for e in found.files if e.path == path), None)):
        raise HttpError(404, f"There is no folder {path} in {revision}.", "EntryNotFound")
    # Folders first, as everywhere.
    listed.sort(key=lambda item: (isinstance(item, FileEntry), item if isinstance(item, str) else item.path))
    shown = listed[begin : begin + _MOST_FILES]
    names = [item if isinstance(item, str) else item.path for item in shown]
    last = last_commits(visit.call, found, names)
    rows = [
        {"path": name, "name": name.rpartition("/")[2], "entry": None if isinstance(item, str) else item,
         "last": last.get(name)}
        for name, item in zip(names, shown, strict=True)
    ]  # fmt: skip
    values = common(visit, found.repository, revision, "files") | {
        "found": found,
        "path": path,
        "steps": _steps(path),
        "rows": rows,
        "begin": begin,
        "total": len(listed),
        "following": begin + len(shown) if begin + len(shown) < len(listed) else None,
    }
    return html("tree.html", values)


def blob(visit: Visit) -> Response:
    """`/{id}/blob/{revision}/{path}`: a file."""
    found, revision, path = _at(visit, files=True)
    entry = next((entry for entry in found.files if entry.path == path), None)
    if entry is None:
        raise HttpError(404, f"There is no file {path} in {revision}.", "EntryNotFound")
    values = common(visit, found.repository, revision, "files") | {
        "found": found,
        "path": path,
        "steps": _steps(path),
        "entry": entry,
        "last": last_commits(visit.call, found, [path]).get(path),
        "view": _view(visit, entry),
    }
    return html("blob.html", values)


def _view(visit: Visit, entry: FileEntry) -> View:
    suffix = PurePosixPath(entry.path).suffix.lower()
    try:
        source = visit.call.hub.content.open(entry.sha256)
    except SurgeryError:
        return View("The server has lost the content of this file; push it again, or restore it from a backup.")
    if suffix == ".safetensors":
        begin, _ = page(parse_qs(visit.call.request.url.query))
        try:
            return View(tensors=tensors.page(source, PurePosixPath(entry.path).name, begin))
        except SurgeryError as error:
            return View(error.message)
    if suffix in _IMAGES and entry.size <= _MAX_IMAGE:
        return View(image=True)
    return _text(source, suffix)


def _text(source: Source, suffix: str) -> View:
    data = read_bytes(source, 0, min(source.size, MAX_TEXT))
    cut = source.size > MAX_TEXT
    try:
        # A character may be cut in two at the end.
        text = data.decode("utf-8") if not cut else data.decode("utf-8", "ignore" if _ends_within(data) else "strict")
    except UnicodeDecodeError:
        return View(_NO_TEXT)
    if "\0" in text:
        return View(_NO_TEXT)
    if suffix in (".json", ".ipynb") and not cut:
        try:
            text = pretty(text)
        except ValueError as error:
            return View(text=text, note=f"This is no JSON ({error}); it is shown as it is.")
    return View(text=text, cut=cut)


def _ends_within(data: bytes) -> bool:
    """Whether only the last character is damaged, by the cut."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(data) - 3
    return True
