"""A Hub in memory, on a loopback port: the part of its protocol that `huggingface_hub` uses for models, without Xet.

Create, preupload, LFS, commit, branches, pull requests, tree and resolve; and it fails as it is told to.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import urllib.parse
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash


class Refused(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class Repo:
    def __init__(self, private):
        self.private = private
        self.refs, self.commits, self.titles, self.pull_requests = {}, {}, {}, 0
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")

    def commit(self, ref, files, title):
        content = json.dumps([ref, title, len(self.commits), sorted(files)])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.refs[ref], self.commits[sha], self.titles[sha] = sha, files, title
        return sha

    def sha_of(self, revision):
        sha = revision if revision in self.commits else self.refs.get(revision)
        if sha is None:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return sha


class Hub(ThreadingHTTPServer):
    """Use as a context manager.

    users (`dict`): a token's name of a user and its role, `"write"` or `"read"`.
    repos (`dict[str, Repo]`): by name. A file is its bytes, or the SHA-256 of those in `objects` as a `str`.
    faults (`list`): a pattern of `METHOD path`, and what happens to the next such request: a status, or `"drop"`, to
        break the connection in the middle of the body.
    requests (`list[str]`): `METHOD path status` of each.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users, self.repos, self.objects, self.faults, self.requests = {}, {}, {}, [], []
        self.sent = defaultdict(int)  # bytes, of each object
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away
            super().handle_error(request, client_address)

    def files(self, repo, revision="main"):
        """The content of all files."""
        files = self.repos[repo].commits[self.repos[repo].sha_of(revision)]
        return {path: self.objects[file] if isinstance(file, str) else file for path, file in files.items()}

    def fault_of(self, request):
        with self.lock:
            for fault in self.faults:
                if re.search(fault[0], request):
                    self.faults.remove(fault)
                    return fault[1]


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"
ROUTES = []


def route(pattern):
    def register(function):
        ROUTES.append((re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would delay each answer by 40 ms

    def log_message(self, *arguments):
        pass

    def handle_request(self):
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query))
        request = f"{self.command} {path}"
        fault = self.server.fault_of(request)
        self.drops = fault == "drop"
        try:
            if isinstance(fault, int):
                self.body()
                raise Refused(fault, f"told to answer {fault}")
            for pattern, function in ROUTES:
                if match := pattern.fullmatch(request):
                    names = {name: urllib.parse.unquote(text) for name, text in match.groupdict().items() if text}
                    answer = function(self, **names)
                    return self.answer(200, answer) if answer is not None else None
            raise Refused(404, f"no route {request}")
        except Refused as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self.answer(error.status, {"error": error.message}, {**headers, "X-Error-Message": error.message})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.requests.append(f"{self.command} {self.path.partition('?')[0]} {status}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.drops else body)
            if self.drops:
                self.hang_up()

    def hang_up(self):
        self.server.requests.append(f"{self.command} {self.path} dropped")
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def user(self):
        return self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def writer(self, repo):
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        if user[1] != "write" or repo.split("/")[0] != user[0]:
            raise Refused(403, f"no right to write to {repo}")
        return user[0]

    def repo(self, name):
        repo = self.server.repos.get(name)
        user = self.user()
        if repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    @route(r"GET /api/whoami-v2")
    def whoami(self):
        if (user := self.user()) is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": user[0], "auth": {"type": "access_token", "accessToken": {"role": user[1]}}}

    @route(r"POST /api/repos/create")
    def create(self):
        wanted = json.loads(self.body())
        name = f"{wanted.get('organization') or (self.user() or ('nobody',))[0]}/{wanted['name']}"
        self.writer(name)
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo")
        self.server.repos[name] = Repo(wanted.get("visibility") == "private" or wanted.get("private", False))
        return {"url": f"{self.server.url}/{name}", "name": name}

    @route(r"POST /api/validate-yaml")
    def validate(self):
        _, header, _ = json.loads(self.body())["content"].split("---\n", 2)
        yaml.safe_load(header)
        return {"errors": [], "warnings": []}

    @route(rf"GET {API}(/revision/(?P<revision>[^/]+))?")
    def info(self, repo, revision="main"):
        sha = self.repo(repo).sha_of(revision)
        files = [{"rfilename": path} for path in sorted(self.repo(repo).commits[sha])]
        return {"id": repo, "sha": sha, "private": self.repo(repo).private, "siblings": files, "tags": []}

    @route(rf"GET {API}/tree/(?P<revision>[^/]+)")
    def tree(self, repo, revision):
        repo = self.repo(repo)
        entries = []
        for path, file in sorted(repo.commits[repo.sha_of(revision)].items()):
            content = self.server.objects[file] if isinstance(file, str) else file
            entries.append({"type": "file", "path": path, "size": len(content), "oid": git_hash(content)})
            if isinstance(file, str):
                entries[-1]["lfs"] = {"oid": file, "size": len(content), "pointerSize": 130}
        return entries

    @route(rf"POST {API}/branch/(?P<revision>[^/]+)")
    def branch(self, repo, revision):
        self.body()
        self.writer(repo)
        repo = self.repo(repo)
        if revision in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[revision] = repo.refs["main"]
        return {}

    @route(rf"POST {API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo, revision):
        wanted = json.loads(self.body())["files"]
        self.writer(repo)
        files = self.repo(repo).commits[self.repo(repo).sha_of(revision)]
        answers = []
        for file in wanted:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in files:
                there = files[file["path"]]
                answers[-1]["oid"] = there if isinstance(there, str) else git_hash(there)
        return {"files": answers}

    @route(rf"POST /{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        objects = json.loads(self.body())["objects"]
        self.writer(repo)
        answers = []
        for wanted in objects:
            answers.append(wanted)
            if wanted["oid"] not in self.server.objects:
                wanted["actions"] = {"upload": {"href": f"{self.server.url}/objects/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": answers}

    @route(r"PUT /objects/(?P<oid>[0-9a-f]+)")
    def lfs_upload(self, oid):
        if self.drops:
            self.rfile.read(1000)
            return self.hang_up()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "another SHA-256 than announced")
        self.server.objects[oid] = content
        self.server.sent[oid] += len(content)
        return b""

    @route(rf"POST {API}/commit/(?P<revision>[^/]+)")
    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body().splitlines()]
        self.writer(repo)
        name, repo = repo, self.repo(repo)
        header = lines[0]["value"]
        parent = repo.sha_of(revision)
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            else:
                del files[value["path"]]
        answer = {}
        if self.query.get("create_pr"):
            repo.pull_requests += 1
            revision = f"refs/pr/{repo.pull_requests}"
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{repo.pull_requests}"
        sha = repo.commit(revision, files, header["summary"])
        return {**answer, "success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}

    @route(rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        repo = self.repo(repo)
        sha = repo.sha_of(revision)
        if path not in repo.commits[sha]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = repo.commits[sha][path]
        content = self.server.objects[file] if isinstance(file, str) else file
        etag = file if isinstance(file, str) else git_hash(file)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status = 200
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(requested[1]), int(requested[2] or len(content) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self.answer(status, content, headers)


TOKEN = "hf_" + "Sentinel" * 4 + "xy"
READ_ONLY = "hf_" + "ReadOnly" * 4 + "xy"


def environment(hub, cache, token=TOKEN):
    """Of a process for which this is the Hub, with an empty cache."""
    variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    variables.pop("HF_HUB_OFFLINE", None)
    variables.pop("HF_TOKEN", None)
    return variables | ({"HF_TOKEN": token} if token else {})


@contextlib.contextmanager
def local_hub(cache):
    """A [`Hub`] for this process and its children, with two tokens of a user `me`."""
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.users.update({TOKEN: ("me", "write"), READ_ONLY: ("me", "read")})
        for name, value in environment(hub, cache).items():
            patch.setenv(name, value)
        patch.delenv("HF_HUB_OFFLINE")
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_CACHE": str(cache / "hub"),
        }.items():
            patch.setattr(constants, name, value)
        # Made once, it would ask the hub of a test before, which is gone, again and again
        patch.setattr("transformers.utils.hub._hf_api", None)
        yield hub
