"""A Hugging Face Hub on loopback: what `datasets` 5.2 and `transformers` 5.23 ask for, and nothing else."""

import contextlib
import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


def hh_rlhf(train: list[dict[str, str]], test: list[dict[str, str]]) -> dict[str, bytes]:
    """Files laid out as in Anthropic/hh-rlhf."""
    half = len(train) // 2
    parts = {
        "harmless-base/train.jsonl.gz": train[:half],
        "helpful-base/train.jsonl.gz": train[half:],
        "harmless-base/test.jsonl.gz": test,
    }
    packed = {
        name: gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()) for name, rows in parts.items()
    }
    return packed | {"README.md": b"---\nlicense: mit\n---\n"}


class StubHub:
    """Repositories by their path: `datasets/owner/name`, or `owner/name` for a model, each with its files.

    A path that ends in `@revision` gives that revision of the repository, others the main branch. `requests` collects
    every path asked for.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.requests: list[str] = []

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The URL for HF_ENDPOINT."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"{handler.command} {handler.path}")
        status, content, headers = self._reply(path)
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if body:
            handler.wfile.write(content)

    def _reply(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        for key, files in self.repositories.items():
            name, _, revision = key.partition("@")
            commit = _digest(revision.encode()) if revision else COMMIT
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            if path == api and not revision:
                return self._json(_info(name, files, commit))
            for known in (revision or "main", commit):
                if path == f"{api}/revision/{known}":
                    return self._json(_info(name, files, commit))
                if f"{path}/".startswith(f"{api}/tree/{known}/"):
                    return self._json(_tree(files, path.removeprefix(f"{api}/tree/{known}").removeprefix("/")))
                if path.startswith(f"/{name}/resolve/{known}/"):
                    return self._file(files, path.removeprefix(f"/{name}/resolve/{known}/"), commit)
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def _file(self, files: dict[str, bytes], name: str, commit: str) -> tuple[int, bytes, dict[str, str]]:
        if name not in files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        return 200, files[name], {"ETag": f'"{_digest(files[name])}"', "X-Repo-Commit": commit}

    def _json(self, value: object) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _info(name: str, files: dict[str, bytes], commit: str) -> dict[str, object]:
    return {
        "_id": "1",
        "id": name.removeprefix("datasets/"),
        "sha": commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": file} for file in files],
    }


def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    inside = {name: content for name, content in files.items() if name.startswith(prefix)}
    folders = sorted({name.rpartition("/")[0] for name in inside} - {"", folder})
    directories: list[dict[str, object]] = [
        {"type": "directory", "oid": "1", "size": 0, "path": name} for name in folders
    ]
    return directories + [
        {"type": "file", "oid": _digest(content), "size": len(content), "path": name}
        for name, content in inside.items()
    ]
