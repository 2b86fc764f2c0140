"""A hub on this machine: the requests that opening a model makes, answered from folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@contextmanager
def hub_of(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serves `{owner/name: folder}`; yields its address and the list of requests, which grows."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            for name, folder in folders.items():
                if path.startswith(f"/api/models/{name}"):
                    files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(folder.iterdir())]
                    listed = {"id": name, "sha": COMMIT, "siblings": files}
                    return self._send(json.dumps(listed).encode(), body, "application/json")
                if path.startswith(f"/{name}/resolve/"):
                    file = folder / path.rpartition("/")[2]
                    if file.is_file():
                        return self._send(file.read_bytes(), body, "application/octet-stream", digest(file))
                    return self._refuse("EntryNotFound")
            return self._refuse("RepoNotFound")

        def _send(self, content: bytes, body: bool, kind: str, tag: str = "") -> None:
            start = 0
            if "Range" in self.headers:
                start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("X-Repo-Commit", COMMIT)
            if tag:
                self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            if body:
                self.wfile.write(content[start:])

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def digest(path: Path) -> str:
    """What the hub calls a file's content."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
