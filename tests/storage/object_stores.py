"""A real object store on this machine, and a proxy before it that fails on purpose.

The store is fake-gcs-server (`make fake-gcs-server`), which speaks the JSON API of Google
Cloud Storage with its preconditions and pages. What the proxy does to a request is the
choice of a test: see FAULTS.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator

BUCKET = "bucket"
# What can happen to a request: it is refused with status 503; its connection is closed before
# it reaches the store, or after it has had its effect there; or half of the answer comes.
FAULTS = ("refuse", "drop", "lose", "cut")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request on its way to the store."""

    number: int  # From 1.
    method: str
    path: str  # With its query.

    @property
    def changes(self) -> bool:
        """Whether it writes or deletes."""
        return self.method != "GET"


def find_server() -> str | None:
    """The program, beside this Python or on the path; None if there is none."""
    beside = pathlib.Path(sys.executable).parent / "fake-gcs-server"
    return str(beside) if beside.exists() else shutil.which("fake-gcs-server")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """Says nothing of clients that have gone: some were killed, which is the point."""


class ObjectStore:
    """The store and the proxy; `url` is what STORAGE_EMULATOR_HOST has to be."""

    def __init__(self, store_port: int):
        self._store_port = store_port
        self._lock, self._number = threading.Lock(), 0
        # Called with each request before it goes on; returns one of FAULTS, or None.
        self.decide: Callable[[Request], str | None] = lambda request: None
        self._proxy = _Proxy(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops the proxy."""
        self._proxy.shutdown()
        self._proxy.server_close()

    @contextlib.contextmanager
    def deciding(self, decide: Callable[[Request], str | None]) -> Iterator[None]:
        """Lets `decide` choose what becomes of requests, which are numbered from 1 again."""
        before, self._number = self.decide, 0
        self.decide = decide
        try:
            yield
        finally:
            self.decide = before

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict | None = None):
        """Sends a request to the store, past the proxy; returns (status, headers, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self._store_port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Name -> contents of all objects whose names begin so, past the proxy."""
        names, page = [], ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, "pageToken": page})
            _, _, body = self.ask("GET", f"/storage/v1/b/{BUCKET}/o?{query}")
            answer = json.loads(body)
            names += [item["name"] for item in answer.get("items", [])]
            page = answer.get("nextPageToken", "")
            if not page:
                break
        found = {}
        for name in names:
            quoted = urllib.parse.quote(name, safe="")
            status, _, body = self.ask("GET", f"/storage/v1/b/{BUCKET}/o/{quoted}?alt=media")
            if status == 200:  # It may have gone in between.
                found[name.removeprefix(prefix).lstrip("/")] = body
        return found

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, past the proxy."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        status, _, body = self.ask("POST", f"/upload/storage/v1/b/{BUCKET}/o?{query}", data)
        assert status == 200, body

    def _next(self, method: str, path: str) -> str | None:
        with self._lock:
            self._number += 1
            return self.decide(Request(self._number, method, path))

    def _handler(store):  # noqa: N805  Its methods have a self of their own.
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = store._next(self.command, self.path)
                if fault == "drop":
                    return self._hang_up()
                if fault == "refuse":
                    answer = b'{"error": {"code": 503, "message": "try again"}}'
                    return self._answer(503, [("Content-Type", "application/json")], answer)
                status, headers, data = store.ask(
                    self.command, self.path, body, dict(self.headers.items())
                )
                if fault == "lose":
                    return self._hang_up()
                return self._answer(status, headers, data, cut=fault == "cut")

            def _answer(self, status, headers, data, *, cut=False) -> None:
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self._hang_up()

            def _hang_up(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _pass_on  # noqa: N815

            def log_message(self, *_) -> None:
                pass

        return Handler


@contextlib.contextmanager
def running(program: str) -> Iterator[ObjectStore]:
    """An object store with an empty bucket, as long as the block lasts."""
    port = _free_port()
    store = ObjectStore(port)
    command = [program, "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
    process = subprocess.Popen(
        [*command, f"-external-url={store.url}", "-log-level=error"], stderr=subprocess.DEVNULL
    )
    try:
        _make_bucket(store, process)
        yield store
    finally:
        store.close()
        process.kill()
        process.wait()


def _make_bucket(store: ObjectStore, process: subprocess.Popen) -> None:
    """Makes the bucket, once the server listens."""
    while process.poll() is None:
        try:
            status, _, body = store.ask(
                "POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode()
            )
        except ConnectionError:
            continue
        assert status == 200, body
        return
    raise AssertionError(f"fake-gcs-server ended with status {process.returncode}")


def failing_every(number: int) -> Callable[[Request], str | None]:
    """Lets every n-th request fail, in one of the FAULTS after the other."""

    def decide(request: Request) -> str | None:
        turn, rest = divmod(request.number, number)
        return None if rest else FAULTS[turn % len(FAULTS)]

    return decide


def main() -> None:
    """Runs a command with an object store beside it: `[--fail_every=N] COMMAND ARGUMENT...`."""
    command, number = sys.argv[1:], 0
    if command[0].startswith("--fail_every="):
        number = int(command.pop(0).partition("=")[2])
    program = find_server()
    if program is None:
        raise SystemExit("no fake-gcs-server; make fake-gcs-server installs it")
    with running(program) as store:
        counts: dict[str | None, int] = {}
        decide = failing_every(number) if number else store.decide

        def count(request: Request) -> str | None:
            fault = decide(request)
            counts[fault] = counts.get(fault, 0) + 1
            return fault

        with store.deciding(count):
            environment = {**os.environ, "STORAGE_EMULATOR_HOST": store.url}
            status = subprocess.run(command, env=environment, check=False).returncode
        found = store.objects()
        failed = ", ".join(f"{counts[fault]} {fault}" for fault in FAULTS if fault in counts)
        print(
            f"store: {len(found)} objects of {sum(map(len, found.values())):,} bytes, after "
            f"{sum(counts.values()):,} requests, of which failed: {failed or 'none'}"
        )
    sys.exit(status)


if __name__ == "__main__":
    main()
