"""A hub on this machine: the few answers of the Hugging Face Hub that creating, uploading and downloading a model ask for."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Keeps commits in memory: `commits` has the files of each, `branches` the commit of each repository's branches."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits, self.branches, self.private = {}, {}, {}

    def commit(self, repo, branch, files):
        sha = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[repo, branch] = sha
        return sha

    def files(self, repo, branch="main"):
        return self.commits[self.branches[repo, branch]]


class _Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, content, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code, what):
        self.send(404, {"error": f"{what} not found"}, {"X-Error-Code": code, "X-Error-Message": f"{what} not found"})

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if (repo, "main") in hub.branches:
                self.send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"})
            else:
                hub.private[repo] = (
                    asked.get("private") or asked.get("visibility") == "private"
                )  # the older and the newer client
                hub.commit(repo, "main", {".gitattributes": b""})
                self.send(200, {"url": f"{hub.url}/{repo}", "name": repo})
        elif self.path == "/api/validate-yaml":
            known = "license: nonsense" not in json.loads(body)["content"]
            self.send(
                200 if known else 400,
                {"errors": [] if known else [{"message": '"license" must be one of [...]'}], "warnings": []},
            )
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)", self.path):
            repo, what, branch = match.groups()
            if (repo, branch) not in hub.branches:
                self.missing("RevisionNotFound", branch)
            elif what == "preupload":
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                self.send(200, {"files": modes})
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in lines if f["key"] == "file"}
                sha = hub.commit(repo, branch, hub.files(repo, branch) | files)
                self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"})
        else:
            self.missing("EntryNotFound", self.path)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(resolve|revision|tree)/([^/]+)/?(.*)", path)
        if not match:
            self.missing("RepoNotFound", path)
            return
        repo, what, revision, name = match.groups()
        sha = hub.branches.get((repo, revision), revision)
        files = hub.commits.get(sha)
        if files is None:
            self.missing("RepoNotFound" if (repo, "main") not in hub.branches else "RevisionNotFound", f"{repo} {revision}")
        elif what == "revision":
            self.send(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        elif what == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()
            ]
            self.send(200, entries)
        elif name not in files:
            self.missing("EntryNotFound", name)
        else:
            etag = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": sha}
            self.send(200, files[name], etag)

    do_HEAD = do_GET


@contextmanager
def serve():
    """Run a hub until the block ends."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
