"""What is read of a commit after it was made: the tensors of files that did not pass by, such as those sent over LFS.

One thread does it while the server runs. What it does not get to, `hub reindex` or the next commit does.
"""

from __future__ import annotations

import logging
import queue
import threading

from surgery.errors import SurgeryError
from surgery.hub.facts import FACTS_VERSION
from surgery.hub.interfaces import FileEntry
from surgery.hub.naming import RepositoryName
from surgery.hub.reindexing import complete
from surgery.hub.store import Registry

_MOST_WAITING = 10_000
log = logging.getLogger("surgery.hub")


class Completer:
    """Examines commits again, one after the other. Ends with the process, at any moment: each change is whole."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._waiting: queue.Queue[tuple[RepositoryName, str]] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._mutex = threading.Lock()

    def take(self, name: RepositoryName, commit: str) -> None:
        """Examine a commit when there is time; forgotten if too many wait."""
        try:
            self._waiting.put_nowait((name, commit))
        except queue.Full:
            log.warning("Too many commits wait to be examined; `surgery hub reindex` makes up for it.")
            return
        with self._mutex:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="facts", daemon=True)
                self._thread.start()

    def take_outdated(self) -> None:
        """Examine what an earlier version wrote the facts of."""
        for name, commit in self._registry.metadata.outdated(FACTS_VERSION)[:_MOST_WAITING]:
            self.take(name, commit)

    def take_unhashed(self, name: RepositoryName, commit: str, files: list[FileEntry]) -> None:
        """Examine a commit if it has weights whose tensors nobody has hashed."""
        weights = [entry.sha256 for entry in files if entry.path.endswith(".safetensors")]
        if any(self._registry.metadata.tensor_hashes(sha256) is None for sha256 in weights):
            self.take(name, commit)

    def _run(self) -> None:
        while True:
            name, commit = self._waiting.get()
            try:
                complete(self._registry, name, commit)
            except SurgeryError as error:  # it was deleted or moved meanwhile, or is damaged
                log.info("Commit %s of %s was not examined: %s", commit, name, error)
