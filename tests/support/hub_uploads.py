"""A server that takes uploads as the Hub does: a repository, large files by their SHA-256, small ones in the commit."""

import base64
import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from support.hub_server import COMMIT, Hub, _Handler, _running


@dataclass
class Uploads(Hub):
    """What has come; the next PUT requests that are `refused` get an error."""

    created: list[dict[str, object]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # large contents by SHA-256
    files: dict[str, bytes] = field(default_factory=dict)  # of the commit
    refused: int = 0
    forbidden: bool = False

    @property
    def received(self):
        """The sizes of the large contents, in the order in which they came."""
        return [len(content) for content in self.objects.values()]


class _UploadHandler(_Handler):
    def do_GET(self):  # noqa: N802 - the library's name
        self.answer(404, X_Error_Code="RepoNotFound")

    def do_POST(self):  # noqa: N802 - the library's name
        hub, path = self.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if hub.forbidden:
            self.answer(403)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.json({"url": f"{hub.url}/{hub.repository}", "name": hub.repository})
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif path == f"/api/models/{hub.repository}/preupload/main":
            modes = [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.json({"files": modes})
        elif path == f"/{hub.repository}.git/info/lfs/objects/batch":
            self.json({"transfer": "basic", "objects": [self.wanted(each) for each in json.loads(body)["objects"]]})
        elif path == f"/api/models/{hub.repository}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.url}/{hub.repository}/commit/{COMMIT}"
            self.json({"commitOid": COMMIT, "commitUrl": url, "hookOutput": "", "success": True})
        else:
            self.answer(404)

    def wanted(self, each):
        """The object, and where to send it unless it is there."""
        there = each["oid"] in self.hub.objects
        action = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/put/{each['oid']}", "header": {}}}}
        return {"oid": each["oid"], "size": each["size"]} | action

    def do_PUT(self):  # noqa: N802 - the library's name
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.refused:
            self.hub.refused -= 1
            self.answer(400)
            return
        digest = urlsplit(self.path).path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.objects[digest] = content
        self.answer(200)

    def json(self, answer):
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")


def mode(name):
    return "lfs" if name.endswith(".safetensors") else "regular"


@contextmanager
def receiving(repository, directory):
    """Take uploads to one repository until the block ends."""
    hub = Uploads(repository, directory)
    with _running(hub, _UploadHandler) as hub.url:
        yield hub
