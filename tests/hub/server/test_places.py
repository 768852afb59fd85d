"""A server where it is tight: a full disk, behind a proxy, on IPv6, and two processes on one folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import resource
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError

from surgery.hub.server.audit import FILE
from surgery.hub.store import open_registry
from tests.hub.registry_tools import assert_sound
from tests.hub.server.serving import Server, serving
from tests.hub.server.test_protocol import put, status
from tests.hub.server.test_safety import Xet, commit, described, lfs_address, lfs_file
from tests.tools import own_disk


def upload(server: Server, data: bytes) -> tuple[int, str]:
    """By LFS, in one PUT."""
    sha256 = hashlib.sha256(data).hexdigest()
    href = lfs_address(server, "ada", "ada/full", sha256, len(data))
    assert href is not None
    answer = httpx2.put(href, content=data)
    return answer.status_code, sha256


def test_a_file_that_does_not_fit(server: Server) -> None:
    """The kernel lets the server write no longer file than this, and says so in the middle of one."""
    server.api().create_repo("full")
    process = server.process
    assert process is not None
    data = random.Random(1).randbytes(3_000_000)
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    try:
        code, sha256 = upload(server, data)
        assert code == 507
        assert "was not uploaded" in commit(server, "ada", "ada/full", lfs_file(sha256)).json()["error"]
        # Over Xet likewise; the stock client then tries again for minutes.
        xet, chunks = Xet(server, "ada", "ada/full"), [random.Random(n).randbytes(100_000) for n in range(20)]
        assert xet.xorb(chunks).status_code == 507
        assert xet.shard(described(chunks)).status_code == 400
        assert server.api().list_repo_files("ada/full") == []
        assert not list((server.data / "incoming").iterdir())
        assert server.stored() == 0
        assert httpx2.get(f"{server.url}/health").status_code == 200
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    code, sha256 = upload(server, data)
    assert code == 200
    assert commit(server, "ada", "ada/full", lfs_file(sha256)).status_code == 200


def test_a_disk_that_is_full() -> None:
    with own_disk(3) as disk, serving(disk) as server:
        api = server.api()
        api.create_repo("full")
        head = put(api, "ada/full", {"a.txt": b"a"})
        filler = disk / "filler"
        with open(filler, "wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 60_000))
        assert upload(server, random.Random(1).randbytes(500_000))[0] == 507
        assert not list((server.data / "incoming").iterdir())
        # To the last byte: then nothing can be changed, and everything be read.
        with open(filler, "ab") as file:
            file.write(bytes(shutil.disk_usage(disk).free))
        for number in range(3):
            with pytest.raises(HfHubHTTPError) as error:
                put(api, "ada/full", {f"{number}.txt": random.Random(number).randbytes(200_000)})
            assert status(error.value) == 507
        assert next(iter(api.list_repo_commits("ada/full"))).commit_id == head
        filler.unlink()
        put(api, "ada/full", {"b.txt": b"b"})
        assert api.list_repo_files("ada/full") == ["a.txt", "b.txt"]
        registry = open_registry(server.data)
        assert_sound(registry)
        registry.close()
        for line in (server.data / FILE).read_bytes().splitlines():
            json.loads(line)


def test_on_ipv6(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(tmp_path, "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        server.client(
            """
            api.create_repo('six')
            api.upload_file(path_or_fileobj=b'weights' * 10_000, path_in_repo='w.bin', repo_id='ada/six')
            assert pathlib.Path(api.hf_hub_download('ada/six', 'w.bin')).read_bytes() == b'weights' * 10_000
            """
        )
        entry = json.loads((server.data / FILE).read_text().splitlines()[-1])
        assert (entry["action"], entry["address"]) == ("commit", "::1")


@contextlib.contextmanager
def forwarding(target: int) -> Iterator[int]:
    """A proxy that hands on every byte as it is. Gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one of the two has gone
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", target)) as server:
            back = threading.Thread(target=pass_on, args=(server, client), daemon=True)
            back.start()
            pass_on(client, server)
            back.join()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
            threads[-1].start()

    threads = [threading.Thread(target=accept, daemon=True)]
    threads[0].start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join(10)


def test_behind_a_proxy(tmp_path: Path) -> None:
    """Every address that the server gives out is the proxy's, over Xet and over LFS."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        forwarding(port) as outside,
        serving(tmp_path, "--url", f"http://127.0.0.1:{outside}", "--port", str(port)) as server,
    ):
        assert server.url == f"http://127.0.0.1:{outside}"
        for disabled in "01":
            server.client(
                f"""
                data = bytes([{disabled}]) * 200_000
                api.create_repo('behind', exist_ok=True)
                api.upload_file(path_or_fileobj=data, path_in_repo='w.bin', repo_id='ada/behind')
                assert pathlib.Path(api.hf_hub_download('ada/behind', 'w.bin')).read_bytes() == data
                """,
                HF_HUB_DISABLE_XET=disabled,
            )
        # What nobody was told to believe is not believed.
        headers = {"Authorization": f"Bearer {server.tokens['ada']}", "X-Forwarded-For": "192.0.2.1"}
        url = f"http://127.0.0.1:{port}/api/models/ada/behind/branch/x"
        assert httpx2.post(url, headers={**headers, "X-Forwarded-Proto": "https"}).status_code == 200
        info = httpx2.head(f"http://127.0.0.1:{port}/ada/behind/resolve/main/w.bin", headers=headers)
        assert info.status_code == 200
        entry = json.loads((server.data / FILE).read_text().splitlines()[-1])
        assert (entry["action"], entry["address"]) == ("ref.add", "127.0.0.1")


def test_two_processes_on_one_folder(server: Server) -> None:
    """Commits that go through both at once are all there, each once; what one signed, the other honours."""
    other = Server(server.data, tokens=server.tokens).start()
    try:
        server.api().create_repo("shared")
        failures: list[Exception] = []

        def work(number: int) -> None:
            api = (server, other)[number % 2].api()
            try:
                for count in range(5):
                    name = f"{number}-{count}.txt"
                    api.create_commit("ada/shared", [CommitOperationAdd(name, name.encode())], commit_message=name)
            except Exception as error:  # whatever it is, the test is to show it
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        names = {f"{number}-{count}.txt" for number in range(4) for count in range(5)}
        for each in (server, other):
            assert set(each.api().list_repo_files("ada/shared")) == names
            titles = [found.title for found in each.api().list_repo_commits("ada/shared")]
            assert sorted(titles) == sorted([*names, "initial commit"])
        data = random.Random(3).randbytes(5000)
        sha256 = hashlib.sha256(data).hexdigest()
        href = lfs_address(server, "ada", "ada/shared", sha256, len(data))
        assert href is not None
        assert httpx2.put(href.replace(server.url, other.url), content=data).status_code == 200
        assert commit(server, "ada", "ada/shared", lfs_file(sha256)).status_code == 200
    finally:
        other.stop()
