"""A Hub on the loopback interface: answers the requests of `huggingface_hub` from folders."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Hub:
    """Serves `revisions[repo_id][revision]`, folders of model repositories; `main` and a tag may share one.

    `requests` lists what was asked for, `cards` the model cards that were sent for validation; what is uploaded goes to
    new folders below `uploads`.
    """

    def __init__(self, revisions: dict[str, dict[str, Path]], uploads: Path):
        self.revisions = revisions
        self.uploads = uploads
        self.requests: list[str] = []
        self.cards: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @staticmethod
    def commit(folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def find(self, repo_id: str, revision: str) -> Path | None:
        folders = self.revisions[repo_id]
        by_commit = {self.commit(folder): folder for folder in folders.values()}
        return folders.get(revision, by_commit.get(revision))


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, body: dict | list) -> None:
        self.answer(json.dumps(body).encode(), Content_Type="application/json")

    def fail(self, code: str) -> None:
        self.answer(b"", 404, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(f"POST {self.path}")
        if self.path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            return self.answer_json({})
        if self.path == "/api/repos/create":
            created = json.loads(body)
            repo_id = f"{created.get('organization', 'you')}/{created['name']}"
            folder = self.hub.uploads / repo_id
            folder.mkdir(parents=True)
            self.hub.revisions[repo_id] = {"main": folder}
            return self.answer_json({"url": f"{self.hub.url}/{repo_id}"})
        repo_id, action, _ = re.fullmatch("/api/models/(.+/.+)/(.+)/(.+)", self.path).groups()
        if action == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer_json({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        folder = self.hub.revisions[repo_id]["main"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        self.answer_json({"commitUrl": f"{self.hub.url}/{repo_id}", "commitOid": self.hub.commit(folder)})

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        of_api = path.startswith("/api/models/")
        repo_id, _, rest = path.removeprefix("/api/models").lstrip("/").partition("/")
        name, _, rest = rest.partition("/")
        repo_id = f"{repo_id}/{name}"
        if repo_id not in self.hub.revisions:
            return self.fail("RepoNotFound")
        kind, _, rest = rest.partition("/")  # "revision", "tree" or "resolve"
        revision, _, file = rest.partition("/")
        folder = self.hub.find(repo_id, revision or "main")
        if folder is None:
            return self.fail("RevisionNotFound")
        sha = self.hub.commit(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path for path in paths}
        if of_api and kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                for name, path in files.items()
            ]
            return self.answer_json(entries)
        if of_api:
            info = {"id": repo_id, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0}
            info["siblings"] = [{"rfilename": name} for name in files]
            return self.answer_json(info)
        if file not in files:
            return self.fail("EntryNotFound")
        self.answer(files[file].read_bytes(), ETag=f'"{etag(files[file])}"', X_Repo_Commit=sha)

    do_HEAD = do_GET


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
