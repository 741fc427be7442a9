"""What the Hub on loopback (hub_server.py) answers: repositories in memory, and a method for each endpoint."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs

import yaml

LFS_SUFFIXES = (".safetensors", ".pt", ".png", ".parquet", ".arrow", ".bin")
REPO = r"(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"


def git_oid(data):
    """The id that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits by id (path → bytes) and branches by name; `titles` are the commits' messages, oldest first."""

    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    titles: list = field(default_factory=list)

    def commit(self, branch, title, files):
        """Make `files` the newest commit of `branch`; returns its id."""
        oid = hashlib.sha1(f"{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.titles.append(title)
        return oid

    def tree(self, revision):
        """(commit id, path → bytes) of a branch or a commit; KeyError where there is none."""
        oid = self.branches.get(revision, revision)
        return oid, self.commits[oid]


class Refused(Exception):
    """An answer other than 200: status, X-Error-Code, X-Error-Message."""


class Endpoints:
    """Methods called with the request's body and the groups of its route.

    They use `answer`, `server`, `token`, `query` and `headers`.
    """

    def user(self):
        """The name behind the token; 401 without one."""
        if self.token is None:
            raise Refused(401, None, "Invalid username or password.")
        return self.server.tokens[self.token]

    def repo(self, kind, repo_id, write=False):
        """The repository. As on the Hub, strangers do not find a private one, and others cannot write to it."""
        found = self.server.repos.get((kind, repo_id))
        if found is None or (found.private and self.token is None):
            raise Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if write and repo_id.split("/")[0] not in (self.user(), "org"):
            raise Refused(403, None, "You don't have the rights to write there")
        return found

    def tree(self, kind, repo_id, revision):
        try:
            return self.repo(kind, repo_id).tree(revision)
        except KeyError:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None

    def whoami(self, body):
        """GET /api/whoami-v2"""
        self.answer({"type": "user", "name": self.user(), "orgs": [{"name": "org"}], "auth": {"type": "access_token"}})

    def create(self, body):
        """POST /api/repos/create"""
        asked, user = json.loads(body), self.user()
        kind, owner = f"{asked.get('type', 'model')}s", asked.get("organization") or user
        if owner not in (user, "org"):
            raise Refused(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.server.repos:
            self.answer({"error": "You already created this repo", "url": url}, 409)
            return
        repo = self.server.repos[kind, repo_id] = Repo(
            private=asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        repo.commit(
            "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        self.answer({"url": url, "id": repo_id})

    def branch(self, body, kind, id, rev):
        """POST …/branch/NAME"""
        repo = self.repo(kind, id, write=True)
        if rev in repo.branches:
            self.answer({"error": "Reference already exists"}, 409)
            return
        repo.branches[rev] = repo.tree(json.loads(body or b"{}").get("startingPoint", "main"))[0]
        self.answer({})

    def validate(self, body):
        """POST /api/validate-yaml: the part of the Hub's rules that a card can easily break."""
        content, errors = json.loads(body)["content"], []
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        data = yaml.safe_load(match[1]) if match else {}
        for entry in data.get("model-index") or []:
            for result in entry["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys() or not all(
                    isinstance(m["value"], int | float) for m in result["metrics"]
                ):
                    errors.append({"message": f"model-index of {entry['name']} is malformed"})
        for base in (
            [data.get("base_model")] if isinstance(data.get("base_model"), str) else data.get("base_model") or []
        ):
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors.append({"message": f"base_model {base!r} is no model id"})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, kind, id, rev):
        """POST …/preupload/REV: how each file is to be sent."""
        self.repo(kind, id, write=True)
        present, files = self.tree(kind, id, rev)[1], []
        for file in json.loads(body)["files"]:
            lfs, data = file["path"].endswith(LFS_SUFFIXES), present.get(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if lfs else git_oid(data)
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.answer({"files": files})

    def batch(self, body, id, kind="models"):
        """POST ….git/info/lfs/objects/batch: where to put each object.

        Several parts above a size, nothing where the object is there already.
        """
        self.repo(kind, id, write=True)
        objects, server = [], self.server
        for item in json.loads(body)["objects"]:
            oid, size = item["oid"], item["size"]
            if oid not in server.blobs:
                upload = {"href": f"{server.endpoint}/lfs/{oid}?signature=secret"}
                if size > server.multipart_above:
                    count = -(-size // server.multipart_above)
                    upload = {
                        "href": f"{server.endpoint}/lfs-complete/{oid}",
                        "header": {"chunk_size": str(server.multipart_above)},
                    }
                    upload["header"] |= {
                        f"{n:05d}": f"{server.endpoint}/lfs-part/{oid}/{n}" for n in range(1, count + 1)
                    }
                item["actions"] = {"upload": upload, "verify": {"href": f"{server.endpoint}/lfs-verify"}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, None, "checksum differs")
        self.server.blobs[oid] = data
        self.answer({})

    def put(self, body, oid):
        """PUT of a whole object."""
        self.store(oid, body)

    def put_part(self, body, oid, number):
        """PUT of one part."""
        self.server.parts[oid, int(number)] = body
        self.answer({}, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body, oid):
        """POST that joins the parts."""
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.store(oid, b"".join(self.server.parts[oid, n] for n in numbers))

    def verify(self, body):
        """POST: is the object there, whole?"""
        asked = json.loads(body)
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, None, "object is missing")
        self.answer({})

    def commit(self, body, kind, id, rev):
        """POST …/commit/REV: apply all operations or none."""
        repo = self.repo(kind, id, write=True)
        files, title = dict(self.tree(kind, id, rev)[1]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.server.blobs:
                        raise Refused(400, None, f"LFS object of {value['path']} was never uploaded")
                    files[value["path"]] = self.server.blobs[value["oid"]]
                case "deletedFile":
                    files.pop(value["path"])
                case key:
                    raise Refused(400, None, f"unknown operation {key}")
        oid = repo.commit(rev, title, files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{id}/commit/{oid}"})

    def info(self, body, kind, id, rev="main"):
        """GET /api/models/ID[/revision/REV]"""
        oid, files = self.tree(kind, id, rev)
        siblings = [{"rfilename": path} for path in files]
        self.answer(
            {
                "id": id,
                "sha": oid,
                "private": self.repo(kind, id).private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
            }
        )

    def refs(self, body, kind, id):
        """GET …/refs"""
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid}
            for n, oid in self.repo(kind, id).branches.items()
        ]
        self.answer({"branches": branches, "tags": [], "converts": []})

    @staticmethod
    def entry(path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def list_tree(self, body, kind, id, rev, path=""):
        """GET …/tree/REV[/PATH][?recursive=true]"""
        files = self.tree(kind, id, rev)[1]
        prefix = f"{path}/" if path else ""
        inside = {name: data for name, data in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {rev}")
        folders = {
            str(name[: m.start()]) for name in inside for m in re.finditer("/", name) if m.start() >= len(prefix)
        }
        entries = [{"type": "directory", "path": f, "oid": git_oid(f.encode()), "size": 0} for f in sorted(folders)]
        entries += [self.entry(name, data) for name, data in inside.items()]
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            entries = [e for e in entries if "/" not in e["path"][len(prefix) :]]
        self.answer(entries)

    def paths_info(self, body, kind, id, rev):
        """POST …/paths-info/REV"""
        asked = json.loads(body) if body[:1] == b"{" else {k: v for k, v in parse_qs(body.decode()).items()}
        files, entries = self.tree(kind, id, rev)[1], []
        for path in asked["paths"]:
            if path in files:
                entries.append(self.entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0})
        self.answer(entries)

    def resolve(self, body, id, rev, path, kind="models"):
        """HEAD and GET …/resolve/REV/PATH; large files answer with a redirect to another host, as to the Hub's CDN."""
        oid, files = self.tree(kind, id, rev)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.answer({"error": "Entry not found"}, 404, headers)
            return
        data = files[path]
        if path.endswith(LFS_SUFFIXES):
            sha = hashlib.sha256(data).hexdigest()
            self.server.blobs[sha] = data
            headers |= {
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self.server.cdn_endpoint}/cdn/{sha}",
            }
            self.answer(b"", 302, headers)
        else:
            self.ranged(data, headers | {"ETag": f'"{git_oid(data)}"'})

    def cdn(self, body, oid):
        """The bytes of a large file."""
        self.ranged(self.server.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def ranged(self, data, headers):
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if not found:
            self.answer(data, 200, headers)
            return
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        self.answer(data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/{REPO}/branch/(?P<rev>.+)", "branch"),
    ("POST", rf"/api/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"/api/{REPO}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    ("GET", rf"/api/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "list_tree"),
    ("GET", rf"/api/{REPO}/refs", "refs"),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<rev>[^/]+))?", "info"),
    ("POST", FILES + r"\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "put"),
    ("PUT", r"/lfs-part/(?P<oid>\w+)/(?P<number>\d+)", "put_part"),
    ("POST", r"/lfs-complete/(?P<oid>\w+)", "complete"),
    ("POST", r"/lfs-verify", "verify"),
    ("GET", r"/cdn/(?P<oid>\w+)", "cdn"),
    ("GET", FILES + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
)
