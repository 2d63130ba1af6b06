"""A model hub on this machine: enough of one to list a model's files and to fetch them."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MODEL = "tiny/model"


@dataclass
class Hub:
    """Serves one folder as MODEL, at one revision."""

    folder: Path
    revision: str = "main"
    refusal: tuple[int, str] | None = None  # status and code, instead of any answer
    tokens: set[str | None] = field(default_factory=set)  # that requests carried
    fetched: set[str] = field(default_factory=set)
    address: str = ""

    @property
    def commit(self) -> str:
        return hashlib.sha1(self.revision.encode()).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            hub.tokens.add(self.headers["Authorization"])
            path = urlsplit(self.path).path
            if hub.refusal:
                status, code = hub.refusal
                self._send(status, b"{}", {"X-Error-Code": code})
            elif path.endswith(f"/revision/{hub.revision}"):
                names = [{"rfilename": file.name} for file in _files(hub)]
                self._send_json({"id": MODEL, "sha": hub.commit, "siblings": names})
            elif "/tree/" in path:
                self._send_json([_entry(file) for file in _files(hub)])
            elif f"/resolve/{hub.commit}/" in path or f"/resolve/{hub.revision}/" in path:
                file = hub.folder / path.rpartition("/")[2]
                if self.command == "GET":
                    hub.fetched.add(file.name)
                self._send(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"'})
            else:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            sized = {"Content-Length": str(len(body)), "X-Repo-Commit": hub.commit}
            for name, value in (sized | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _files(hub: Hub) -> list[Path]:
    return sorted(file for file in hub.folder.iterdir() if file.is_file())


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(file: Path) -> dict[str, object]:
    return {
        "type": "file",
        "path": file.name,
        "size": file.stat().st_size,
        "oid": _etag(file),
    }
