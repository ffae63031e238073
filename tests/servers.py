"""Servers on this machine for tests: a line that can be cut, a web server, a Hub."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ENDLESS = 1 << 60


class Proxy:
    """Passes connections on to a server, and can end them, or fall silent, after some bytes of its answers."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._server = (parts.hostname, parts.port)
        self.passed, self.limit, self.outages, self.silent = 0, ENDLESS, ENDLESS, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: int, times: int = ENDLESS) -> None:
        """End connections once `count` more bytes have passed; only so many `times`."""
        self.passed, self.limit, self.outages = 0, count, times

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(8192):
                self.passed += len(data) * answers
                while answers and self.silent and self.passed > self.limit:
                    time.sleep(0.05)
                if answers and self.passed > self.limit:
                    self.outages -= 1
                    if not self.outages:
                        self.limit = ENDLESS
                    break
                to.sendall(data)
        for each in (source, to):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


class _Parts(SimpleHTTPRequestHandler):
    """Serves parts of files, which Python's own handler does not."""

    def send_head(self) -> Any:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().send_head()
        start, end = int(wanted[1]), int(wanted[2]) + 1
        data = path.read_bytes()[start:end]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, format: str, *args: object) -> None: ...


class _Hub(_Parts):
    """The part of the Hugging Face Hub's interface that its file system uses, for the one data set me/photographs."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/datasets/me/photographs":
            self._answer({"id": "me/photographs", "sha": "0" * 40, "siblings": []})
        elif found := re.fullmatch(r"/api/datasets/me/photographs/tree/main(/.*)?", path):
            self._answer(list(self._tree(found[1] or "")))
        elif path.startswith("/datasets/me/photographs/resolve/main/"):
            self.path = path.removeprefix("/datasets/me/photographs/resolve/main")
            super().do_GET()
        else:
            self._answer({"error": "Repository not found"}, status=404, reason="RepoNotFound")

    def _tree(self, below: str) -> Iterator[dict[str, Any]]:
        root = Path(self.directory)
        for path in sorted((root / below.lstrip("/")).rglob("*")):
            name = str(path.relative_to(root))
            if path.is_dir():
                yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
                continue
            data = path.read_bytes()
            about = {"type": "file", "oid": "1" * 40, "size": len(data), "path": name}
            if path.suffix == ".parquet":
                about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            yield about

    def _answer(self, value: object, status: int = 200, reason: str = "") -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        if reason:
            self.send_header("X-Error-Code", reason)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serve(root: Path, *, hub: bool = False) -> Iterator[str]:
    """The address of a web server of the files in `root`; with `hub`, they are a data set of a Hub."""
    root.mkdir(parents=True, exist_ok=True)
    handler = partial(_Hub if hub else _Parts, directory=str(root))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def point_hub_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client talk to another server."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", url)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
