"""A stand-in of the Hub on 127.0.0.1: what its client asks for on the way of an upload, and what it is answered."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_ThisIsTheSecretToken"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})


class Hub(ThreadingHTTPServer):
    """repos: by name. stored: large files by sha256. puts: how many came. refuse_put: the one that is refused, from 1."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.puts, self.refuse_put, self.lock = 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer({"error": "Invalid user token."}, 401)
        return False

    def do_GET(self) -> None:
        path, name = self.path.split("?")[0], self.path.split("?")[0].removeprefix("/api/models/")
        if not self._known():
            return
        if path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": "owner", "auth": {"accessToken": {"role": "write"}}})
        if (repo := self.server.repos.get(name)) is None:
            return self._answer({"error": "Repository not found"}, 404)
        files = [{"rfilename": file, "size": len(data)} for file, data in repo.files.items()]
        return self._answer({"id": name, "sha": "0" * 40, "private": repo.private, "siblings": files, "tags": []})

    def do_POST(self) -> None:
        body = self._body()
        if not self._known():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [("lfs" if name.endswith(".safetensors") else "regular") for name in files]
            self._answer({"files": [
                {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in zip(files, modes, strict=True)
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._place(obj) for obj in json.loads(body)["objects"]]})
        else:
            self._commit(self.path.removeprefix("/api/models/").split("/commit/")[0], body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.address}/{name}"}
        if name in self.server.repos:
            return self._answer({"error": "You already created this model repo", **url}, 409)
        self.server.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
        return self._answer(url)

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server.stored:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.server.address}/put/{asked['oid']}", "header": {}}}}

    def do_PUT(self) -> None:
        body, oid = self._body(), self.path.split("/")[-1]
        with self.server.lock:
            self.server.puts += 1
            refused = self.server.puts == self.server.refuse_put
        if refused or hashlib.sha256(body).hexdigest() != oid:
            return self._answer({"error": f"no, even if you say {TOKEN}"}, 403)
        self.server.stored[oid] = body
        return self._answer({})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.server.repos[name].files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.address}/{name}/commit/1"})
