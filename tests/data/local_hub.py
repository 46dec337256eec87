"""A Hub on this machine with one data set, `owner/name`, whose files are in a folder: as much as clients ask of one."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@contextlib.contextmanager
def serving(folder: Path):
    """The address of the Hub, and the requests that it has seen."""
    seen = []

    class Handler(_Handler):
        files, asked = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}, seen

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, Path]
    asked: list[str]

    def log_message(self, format, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.asked.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        if re.fullmatch(r"/api/datasets/owner/name(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            return self._answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        if found := re.fullmatch(r"/api/datasets/owner/name/tree/[^/]+/?(.*)", path):
            return self._tree(found[1])
        if found := re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.+)", path):
            return self._file(found[1])
        return self._answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def _tree(self, folder):
        """Files and folders directly in a folder."""
        names = [Path(name).relative_to(folder) for name in self.files if Path(name).is_relative_to(folder)]
        entries = {
            str(Path(folder, name.parts[0])): self._entry(str(Path(folder, name))) if len(name.parts) == 1 else None
            for name in names
        }
        listed = [entry or {"type": "directory", "oid": "", "size": 0, "path": path} for path, entry in entries.items()]
        if not listed:
            return self._answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        return self._answer(json.dumps(listed).encode())

    def _entry(self, name):
        data = self.files[name].read_bytes()
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}

    def _file(self, name):
        if name not in self.files:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = self.files[name].read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None:
            return self._answer(data, 200, headers)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return self._answer(data[start:end], 206, headers)

    def _answer(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
