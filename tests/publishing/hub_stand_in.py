"""A stand-in of the Hugging Face Hub on the loopback interface: the endpoints that huggingface_hub requests.

It keeps repositories in memory and receives large files by LFS (Xet is another service, and is switched off in the
tests). It serves these from another host, as the Hub does, to which no token may be sent.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

# the tokens of an identity provider do not begin with hf_
WRITER, READER = "marker-of-a-writer-0123456789", "hf_marker_of_a_reader_0123456789"
OWNER = {WRITER: "anna", READER: "ben"}
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "openrail++")


@dataclass
class Repository:
    """Files by branch, and files by commit."""

    private: bool
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)
    states: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit

    def commit_of(self, revision: str) -> str | None:
        """The commit of a branch, or the revision itself if it is a commit."""
        if revision in self.states:
            return revision
        if revision not in self.branches:
            return None
        files = self.branches[revision]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.states[commit] = dict(files)
        return commit


class Hub:
    """The server, its repositories, and the requests it received: (method, path, token)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.failing: tuple[str, int, dict, str] | None = None  # part of a path; status, headers, body of the answer
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def other_origin(self) -> str:
        """The same server under another host name."""
        return f"http://localhost:{self.server.server_port}/cdn"

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository with these files on its main branch."""
        self.repositories[name] = Repository(private, gated, {"main": dict(files)})
        return self.repositories[name]

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[name].branches[branch]

    def fetched(self) -> list[str]:
        """Names of the files that were downloaded."""
        return [unquote(path).partition("/resolve/")[2].partition("/")[2] for _, path, _ in self.asked
                if "/resolve/" in path]  # fmt: skip

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.asked.append((self.command, self.path, self.token))
        if self.hub.failing and self.hub.failing[0] in path:
            _, status, headers, body = self.hub.failing
            return self._send(status, body.format(token=self.token).encode(), headers)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, *match.groups())
        return self._refuse(404, "NotFound", f"no endpoint {self.command} {path}")

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"", headers)

    def _find(self, name: str, *, write: bool = False) -> Repository | None:
        """The repository if the token may access it; else the Hub's refusal is sent, and None returned."""
        repository = self.hub.repositories.get(name)
        if self.token and self.token not in OWNER:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and OWNER.get(self.token) != name.partition("/")[0]):
            return self._refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if write and OWNER.get(self.token) != name.partition("/")[0]:
            return self._refuse(403, None, "Forbidden: you must use a write token to upload to a repository")
        return repository

    def _at(self, name: str, revision: str | None, *, write: bool = False) -> tuple[Repository, str] | None:
        if (repository := self._find(name, write=write)) is None:
            return None
        if (commit := repository.commit_of(revision or "main")) is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if self.token not in OWNER:
            return self._refuse(401, None, "Invalid username or password.")
        if OWNER[self.token] != wanted["organization"]:
            return self._refuse(403, None, f"You don't have the rights to create a model under {name}")
        if name in self.hub.repositories:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409
            )
        private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
        self.hub.repositories[name] = Repository(private)
        return self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def validate_yaml(self) -> None:
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        errors = [] if metadata.get("license") in LICENCES else [{"message": '"license" must be one of [apache-2.0]'}]
        base_model = metadata.get("base_model", "owner/name")
        warnings = (
            []
            if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model)
            else [{"message": f"base_model {base_model} is not valid"}]
        )
        self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def info(self, name: str, revision: str | None) -> None:
        if found := self._at(name, revision):
            repository, commit = found
            siblings = [{"rfilename": path, "size": len(data)} for path, data in repository.states[commit].items()]
            self._json(
                {"id": name, "sha": commit, "private": repository.private, "gated": repository.gated, "tags": [],
                 "siblings": siblings, "downloads": 0}
            )  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        if found := self._at(name, revision):
            self._json([_entry(path, data) for path, data in found[0].states[found[1]].items()])

    def branch(self, name: str, branch: str) -> None:
        if repository := self._find(name, write=True):
            if branch in repository.branches:
                return self._json({"error": f"Reference already exists: refs/heads/{branch}"}, 409)
            repository.branches[branch] = dict(repository.branches["main"])
            self._json({})

    def preupload(self, name: str, revision: str) -> None:
        if found := self._at(name, revision, write=True):
            held = found[0].states[found[1]]
            self._json(
                {"files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(file["path"], held[file["path"]]) if file["path"] in held else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]}
            )  # fmt: skip

    def batch(self, name: str) -> None:
        if self._find(name, write=True):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.other_origin}/{each['oid']}"}}}
                for each in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._refuse(400, None, "not what was announced")
        self.hub.large[oid] = self.body
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        if (found := self._at(name, revision, write=True)) is None:
            return
        repository, files = found[0], dict(found[0].branches[revision])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[revision] = files
        repository.messages.append(message)
        commit = repository.commit_of(revision)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        repository, commit = found
        if repository.gated:
            return self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        if path not in repository.states[commit]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = repository.states[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(path, data)}"'}
        if not _is_large(path):
            return self._send(200, data, headers)
        oid = _oid(path, data)
        self.hub.large[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", headers | {"Location": f"{self.hub.other_origin}/{oid}"})

    def large(self, oid: str) -> None:
        self._send(200, self.hub.large[oid], {"ETag": f'"{oid}"'})


ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", _Handler.info),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", _Handler.tree),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", _Handler.branch),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", _Handler.commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /cdn/(\w+)", _Handler.put),
    (r"GET /cdn/(\w+)", _Handler.large),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png", ".jpg"))


def _oid(path: str, data: bytes) -> str:
    """The SHA-256 for LFS, else git's blob hash."""
    return (
        hashlib.sha256(data).hexdigest()
        if _is_large(path)
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


def _entry(path: str, data: bytes) -> dict:
    oid = _oid(path, data)
    lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if _is_large(path) else {}
    return {"type": "file", "path": path, "size": len(data), "oid": oid[:40]} | lfs
