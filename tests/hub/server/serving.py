"""A server in a process of its own, and stock clients in theirs, each with a fresh home."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from surgery.hub.server.run import add_organisation, add_user, create_token

ADMIN = "admin-token-of-the-tests"
ROOT = Path(__file__).parents[3]


@dataclass
class Server:
    """A running server, its data, and its users' tokens by name and role."""

    data: Path
    url: str = ""
    process: subprocess.Popen[str] | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    homes: int = 0
    options: tuple[str, ...] = ()
    log: Path | None = None

    def start(self) -> Server:
        # After a restart at the same address, so that clients that wait for it go on.
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "surgery", "hub", "serve", "--data", str(self.data), "--port", port]
        command += self.options
        environment = {**os.environ, "SURGERY_HUB_ADMIN_TOKEN": ADMIN, "PYTHONUNBUFFERED": "1"}
        self.log = self.data.parent / "server.log"
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "HF_ENDPOINT=" in line, line
        self.url = line.strip().rpartition("=")[2]
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def token(self, user: str, role: str = "write", **scope: Any) -> str:
        report = create_token(self.data, user, role, scope.get("repository"), scope.get("days"), None)
        assert report.token is not None
        return report.token

    def people(self) -> None:
        """Ada and Bob, and the lab that Ada is in."""
        for name in ("ada", "bob"):
            add_user(self.data, name)
            self.tokens[name] = self.token(name)
        add_organisation(self.data, "lab", ("ada",), private_by_default=False)

    def api(self, user: str | None = "ada") -> HfApi:
        token = False if user is None else ADMIN if user == "admin" else self.tokens.get(user, user)
        return HfApi(endpoint=self.url, token=token)

    def home(self) -> Path:
        self.homes += 1
        return self.data.parent / f"home-{self.homes}"

    def client(self, code: str, user: str = "ada", home: Path | None = None, **variables: str) -> Any:
        """Run a stock client on this server; returns what it prints last, as JSON."""
        run = subprocess.run(**self.command(code, user, home, variables), timeout=120, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        return json.loads(run.stdout.strip().splitlines()[-1]) if run.stdout.strip() else None

    def command(self, code: str, user: str, home: Path | None, variables: Mapping[str, str]) -> dict[str, Any]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or self.home()),
            "HF_TOKEN": self.tokens.get(user, user),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **variables,
        }
        head = "import json, hashlib, pathlib\nfrom huggingface_hub import HfApi\napi = HfApi()\n"
        command = [sys.executable, "-c", head + textwrap.dedent(code)]
        return {"args": command, "env": environment, "capture_output": True, "text": True}

    def stored(self) -> int:
        """Bytes of content in the folder, chunks included."""
        places = [self.data / name for name in ("blobs", "xorbs", "recipes")]
        return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """A server with Ada, Bob and the lab."""
    server = Server(folder / "data", options=options).start()
    try:
        server.people()
        yield server
    finally:
        server.stop(signal.SIGKILL)
