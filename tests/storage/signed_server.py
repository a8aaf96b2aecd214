"""A server of files on loopback that answers signed URLs alone, as object stores do."""

import contextlib
import http.server
import logging
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

# As signatures are: with characters that a URL escapes.
SECRET = "wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCY"
_LAST_PART = "bPxRfiCY"


def holds_secret(data: bytes) -> bool:
    """Whether bytes hold the signature, escaped or not, or its end."""
    return _LAST_PART.encode() in data


@contextlib.contextmanager
def serving(directory: pathlib.Path) -> Iterator[str]:
    """Serves the files of a directory as long as the block lasts; yields the URL before a name."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, _, query = self.path.partition("?")
            path = directory / urllib.parse.unquote(name).lstrip("/")
            if f"X-Amz-Signature={SECRET}" not in query.split("&"):
                self.send_error(403)
            elif name == "/broken":
                self.send_error(400, "broken " + self.path)
            elif not path.is_file():
                self.send_error(404)
            else:
                self._send(path.read_bytes())

        do_HEAD = do_GET

        def _send(self, data: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first = int(wanted[1]) if wanted else 0
            last = int(wanted[2] or len(data) - 1) if wanted else len(data) - 1
            part = data[first : last + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{len(data)}"')
            self.send_header("Content-Length", str(len(part)))
            if wanted:
                self.send_header(
                    "Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}"
                )
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def open_it(url: str):
    """A source function that fails, and repeats the URL that it takes whole."""
    raise OSError(f"cannot read {url}" if SECRET in url else "no signature")


def break_on(url: str):
    """A source function with a defect, which logs and repeats the URL."""
    try:
        raise ValueError(f"'{url}'")
    except ValueError:
        logging.getLogger("source").warning("cannot read %s", url, exc_info=True)
        raise
