"""Stock clients on a server of ours, measured: `python -m benchmarks.hub_runs SUBJECT FOLDER RUNS PATH...`.

Prints one JSON object. Each client is a process of its own with a home folder of its own, and knows nothing of the
others. Subjects: `transfer` MODEL, `mixture` DENSE MIXTURE, `version` ADAPTER CHANGED, `many` ADAPTER CLIENTS.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADMIN = "administrator-of-the-benchmarks"
NAME = "admin/measured"


@dataclass
class Server:
    """A server of ours on a new folder."""

    folder: Path
    url: str
    process: subprocess.Popen[str]

    @property
    def stored(self) -> int:
        """Bytes of content."""
        places = [self.folder / "data" / name for name in ("blobs", "recipes", "xorbs")]
        return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())

    @property
    def peak(self) -> int:
        """The most memory that the server has used, in bytes, where the system says."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0

    def environment(self, home: Path) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": ADMIN,
        }

    def push(self, model: Path, name: str, home: str) -> dict[str, float]:
        return measured(["upload", name, str(model), "."], self.environment(self.folder / home), self.folder)

    def pull(self, name: str, home: str, target: Path) -> dict[str, float]:
        command = ["download", name, "--local-dir", str(target)]
        return measured(command, self.environment(self.folder / home), self.folder)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server on a new folder, which is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "surgery", "hub", "serve", "--data", str(folder / "data"), "--port", "0"]
    environment = os.environ | {"SURGERY_HUB_ADMIN_TOKEN": ADMIN, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip().rpartition("=")[2]
            yield Server(folder, url, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


def measured(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> dict[str, float]:
    """What `hf COMMAND` used; for a command that begins with a path, what that used."""
    whole = list(command) if command[0].startswith("/") else [str(Path(sys.executable).with_name("hf")), *command]
    os.sync()
    launcher = [sys.executable, str(ROOT / "benchmarks" / "launcher.py"), str(folder / "log.txt"), *whole]
    done = subprocess.run(launcher, env=dict(environment), stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    if found["status"]:
        raise SystemExit(f"{' '.join(whole)} ended with {found['status']}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return found


def transfer(folder: Path, runs: int, model: Path) -> dict[str, object]:
    """Push and pull a model, and copy and hash it, in turn."""
    pushes, pulls, copies, peaks = [], [], [], []
    copy = ["/bin/sh", "-c", 'cp -r "$1" "$2" && exec sha256sum "$2"/*', "sh", str(model), str(folder / "copy")]
    for _ in range(runs):
        with serving(folder / "server") as server:
            pushes.append(server.push(model, NAME, "one"))
            peaks.append(server.peak)
            pulls.append(server.pull(NAME, "two", folder / "pulled"))
            _same(model, folder / "pulled")
        copies.append(measured(copy, os.environ, folder))
        for place in ("copy", "pulled"):
            shutil.rmtree(folder / place)
    return {"push": pushes, "pull": pulls, "copy": copies, "server": peaks, "nbytes": _size(model)}


def _same(one: Path, other: Path) -> None:
    for path in one.iterdir():
        if path.read_bytes() != (other / path.name).read_bytes():
            raise SystemExit(f"{path.name} came back as another file")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def mixture(folder: Path, _runs: int, dense: Path, mixed: Path) -> dict[str, object]:
    """By how much the store grows for a mixture after its dense checkpoint: from the same home, and from a new one."""
    grown, pulls = {}, {}
    for home in ("same", "new"):
        with serving(folder / "server") as server:
            server.push(dense, "admin/dense", "same")
            before = server.stored
            server.push(mixed, "admin/mixture", home)
            grown[home] = server.stored - before
            pulls[home] = server.pull("admin/mixture", "reader", folder / "pulled")
            _same(mixed, folder / "pulled")
            shutil.rmtree(folder / "pulled")
    return {"grown": grown, "pull": pulls, "dense": _size(dense), "mixture": _size(mixed)}


def version(folder: Path, _runs: int, first: Path, second: Path) -> dict[str, object]:
    """By how much the store grows for version 2 of an adapter."""
    grown = {}
    for home in ("same", "new"):
        with serving(folder / "server") as server:
            server.push(first, NAME, "same")
            before = server.stored
            server.push(second, NAME, home)
            grown[home] = server.stored - before
    return {"grown": grown, "nbytes": _size(second)}


def many(folder: Path, runs: int, adapter: Path, number_of: Path) -> dict[str, object]:
    """One client, and many at once, each with a new home."""
    clients = int(str(number_of))
    with serving(folder / "server") as server:
        server.push(adapter, NAME, "pusher")
        one, all_ = [], []
        for run in range(runs):
            one.append(server.pull(NAME, f"one-{run}", folder / "alone")["wall"])
            shutil.rmtree(folder / "alone")
            begin = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(lambda number, run=run: _pull(server, folder, f"{run}-{number}"), range(clients)))
            all_.append(time.perf_counter() - begin)
            for number in range(clients):
                _same(adapter, folder / f"many-{run}-{number}")
                shutil.rmtree(folder / f"many-{run}-{number}")
        return {"one": one, "all": all_, "nbytes": _size(adapter), "clients": clients}


def _pull(server: Server, folder: Path, number: str) -> None:
    own = folder / f"client-{number}"
    own.mkdir()
    command = ["download", NAME, "--local-dir", str(folder / f"many-{number}")]
    measured(command, server.environment(own / "home"), own)
    shutil.rmtree(own)


def main() -> None:
    subject, folder, runs, *paths = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    subjects: dict[str, Callable[..., dict[str, object]]] = {
        "transfer": transfer,
        "mixture": mixture,
        "version": version,
        "many": many,
    }
    print(json.dumps(subjects[subject](Path(folder), int(runs), *map(Path, paths))))


if __name__ == "__main__":
    main()
