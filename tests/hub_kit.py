"""A server on this machine that speaks what huggingface_hub needs to make a repository and fill it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_a_test"


class FakeHub(ThreadingHTTPServer):
    """`repos` has {(kind, name): {"private", "sdk", "files": {path: bytes}}}. The token that it knows is TOKEN."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}
        self.uploaded = {}  # large files, by SHA-256
        self.trouble = None  # (part of a path, status, words): what is asked for such a path fails

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def create(self, kind: str, name: str, private: bool, sdk: str | None = None) -> None:
        self.repos[kind, name] = {"private": private, "sdk": sdk, "files": {}}


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.path.startswith("/api/"):
            self.answer(404, {"error": self.path})
            return
        kind, name = self.place()
        self.answer(200, {"id": name, "sha": "0" * 40, "private": self.server.repos[kind, name]["private"]})

    def do_PUT(self):
        data = self.body()
        self.server.uploaded[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, {})

    def do_POST(self):
        data = self.body()
        trouble = self.server.trouble
        if trouble and trouble[0] in self.path:
            self.answer(trouble[1], {"error": trouble[2]})
        elif self.path == "/api/validate-yaml":  # anyone may ask
            self.answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.create(json.loads(data))
        elif "/preupload/" in self.path:
            self.choose_ways(json.loads(data))
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.offer(json.loads(data))
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in data.splitlines()])
        else:
            self.answer(404, {"error": self.path})

    def create(self, asked: dict):
        kind = asked.get("type") or "model"
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("private") or asked.get("visibility") == "private"  # as older and newer releases say it
        prefix = "spaces/" if kind == "space" else ""
        place = {"url": f"{self.server.url}/{prefix}{name}"}
        if (kind, name) in self.server.repos:
            self.answer(409, place | {"error": f"You already created this {kind} repo"})
            return
        self.server.create(kind, name, private, asked.get("sdk"))
        self.answer(200, place)

    def choose_ways(self, asked: dict):
        files = []
        for file in asked["files"]:
            way = "lfs" if file["path"].endswith((".safetensors", ".pt")) else "regular"
            files.append({"path": file["path"], "uploadMode": way, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def offer(self, asked: dict):
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.server.url}/store/{one['oid']}"}
            objects.append({"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, lines: list[dict]):
        kind, name = self.place()
        files = self.server.repos[kind, name]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'0' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def place(self) -> tuple[str, str]:
        """(kind, name) of a path /api/models/USER/NAME/..."""
        parts = self.path.split("?")[0].split("/")
        return parts[2].removesuffix("s"), "/".join(parts[3:5])

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
