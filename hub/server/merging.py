"""Taking a pull request in: three lists of files become one, path by path."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.hub.interfaces import FileEntry


def merged(
    base: Sequence[FileEntry], ours: Sequence[FileEntry], theirs: Sequence[FileEntry]
) -> tuple[list[FileEntry], list[str]]:
    """What `theirs` changed since `base`, done to `ours`.

    Returns the files by path, and the paths that both changed, each in its own way; those are left as in `ours`.
    """
    before, here, there = ({entry.path: entry for entry in files} for files in (base, ours, theirs))
    result = dict(here)
    conflicts = []
    for path in sorted(before.keys() | there.keys()):
        was, now, wanted = before.get(path), here.get(path), there.get(path)
        if wanted in (was, now):
            continue
        if now != was:
            conflicts.append(path)
        elif wanted is None:
            del result[path]
        else:
            result[path] = wanted
    return sorted(result.values()), conflicts


def change_lines(before: Sequence[FileEntry], after: Sequence[FileEntry]) -> list[str]:
    """What changed, as `git diff --name-status` writes it: `A`, `M` or `D`, a tab, and the path."""
    old, new = ({entry.path: entry for entry in files} for files in (before, after))
    changed = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
    return [f"{'A' if path not in old else 'D' if path not in new else 'M'}\t{path}" for path in changed]
