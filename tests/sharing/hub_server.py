"""A Hub on this machine that takes uploads: as much as `huggingface_hub` asks of one, and what it was sent."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

USER, TOKEN = "anna", "hf_tokenOfTheTests0123456789"
LARGE = (".safetensors", ".tar", ".png", ".parquet")  # sent as LFS objects, the others in the commit


class HubServer:
    """What the Hub holds and has been asked.

    Attributes:
        repositories: files of each revision of a repository, by "models/owner/name" and then the commit or branch.
        cards: what the Hub says of a repository's card, by the same names.
        asked: method and path of every request.
        commits: what each commit said: the message, and the paths that were added and deleted.
        private: repositories that were created as such.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.cards: dict[str, dict] = {}
        self.asked: list[str] = []
        self.commits: list[tuple[str, list[str], list[str]]] = []
        self.private: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.full = False  # whether the store of large files refuses them

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The files of a repository."""
        return self.repositories[f"{kind}/{name}"][revision]

    def add(self, name: str, files: dict[str, bytes], kind: str = "models") -> str:
        """Makes a commit, as if by somebody else."""
        return self.commit(f"{kind}/{name}", files, [])

    def commit(self, repository: str, added: dict[str, bytes], deleted: list[str]) -> str:
        revisions = self.repositories.setdefault(repository, {"main": {}})
        files = {path: data for path, data in revisions["main"].items() if path not in deleted} | added
        text = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        revisions["main"] = revisions[commit] = files
        return commit

    def commit_of(self, repository: str, revision: str) -> str | None:
        revisions = self.repositories[repository]
        if revision not in revisions:
            return None
        return next((name for name, files in revisions.items() if name != "main" and files == revisions[revision]), "0")


@contextlib.contextmanager
def serving(tmp_path, *, token: str | None = TOKEN) -> Iterator[HubServer]:
    """Within the block, `huggingface_hub` talks to this Hub, with an empty cache."""
    hub = HubServer()

    class Handler(_Handler):
        server_hub = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, format, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server_hub, self._asked()
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": "Invalid user token."}, 401)
            return self._answer({"type": "user", "name": USER, "orgs": [{"name": "lab"}]})
        if found := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/revision/(.+))?", path):
            repository, revision = f"{found[1]}/{found[2]}", found[3] or "main"
            if repository not in hub.repositories:
                return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if (commit := hub.commit_of(repository, revision)) is None:
                return self._answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = [{"rfilename": name} for name in hub.repositories[repository][revision]]
            card = {"cardData": hub.cards[repository]} if repository in hub.cards else {}
            return self._answer({"id": found[2], "sha": commit, "siblings": files, "private": False, **card})
        if found := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/tree/([^/]+)", path):
            if f"{found[1]}/{found[2]}" not in hub.repositories:
                return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = hub.repositories[f"{found[1]}/{found[2]}"][found[3]]
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._answer(listed)
        if found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            repository = f"{'datasets' if found[1] else 'models'}/{found[2]}"
            if repository not in hub.repositories:
                return self._answer({}, 404, {"X-Error-Code": "RepoNotFound"})
            commit, files = hub.commit_of(repository, found[3]), hub.repositories[repository].get(found[3], {})
            if commit is None or found[4] not in files:
                code = "RevisionNotFound" if commit is None else "EntryNotFound"
                return self._answer({}, 404, {"X-Error-Code": code, "X-Repo-Commit": commit or ""})
            data = files[found[4]]
            return self._answer(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})
        return self._answer({"error": "unknown"}, 404)

    def do_POST(self):
        hub, path = self.server_hub, self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            told = json.loads(body)
            owner, kind = told.get("organization") or USER, told.get("type", "model")
            if owner not in (USER, "lab"):
                told = f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
                return self._answer({"error": told}, 403)
            name = f"{owner}/{told['name']}"
            hub.add(name, {".gitattributes": b""}, f"{kind}s")
            if told.get("private") or told.get("visibility") == "private":
                hub.private.append(name)
            return self._answer({"url": f"{huggingface_hub.constants.ENDPOINT}/{name}", "name": name})
        if re.fullmatch(r"/api/(models|datasets)/[\w.-]+/[\w.-]+/preupload/main", path):
            modes = [
                {
                    **{"path": file["path"], "shouldIgnore": False, "oid": None},
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            address = huggingface_hub.constants.ENDPOINT
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{address}/upload/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/((?:models|datasets)/[\w.-]+/[\w.-]+)/commit/main", path):
            header, added, deleted = {}, {}, []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    header = value
                elif line["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    added[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    deleted.append(value["path"])
            hub.commits.append((header["summary"], sorted(added), deleted))
            commit, kind = hub.commit(found[1], added, deleted), found[1].removeprefix("models/")
            address = huggingface_hub.constants.ENDPOINT
            return self._answer({"commitOid": commit, "commitUrl": f"{address}/{kind}/commit/{commit}"})
        return self._answer({"error": "unknown"}, 404)

    def do_PUT(self):
        found = re.fullmatch(r"/upload/(\w+)", self._asked())
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server_hub.full:
            return self._answer({"error": "Storage quota exceeded"}, 403)
        assert found and hashlib.sha256(body).hexdigest() == found[1]
        self.server_hub.objects[found[1]] = body
        return self._answer({})

    def _asked(self) -> str:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server_hub.asked.append(f"{self.command} {path}")
        return path

    def _answer(self, body, status=200, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
