"""Google Cloud Storage's JSON protocol: https://cloud.google.com/storage/docs/json_api."""

import json
import re
import time
import uuid
from typing import Any
from urllib.parse import unquote

from tests.object_store.objects import Object, Objects, PreconditionFailed, Reply, Request, send

_PAGE = 1000
_REASONS = {
    401: "authError",
    403: "forbidden",
    404: "notFound",
    412: "conditionNotMet",
    429: "rateLimitExceeded",
}
_MESSAGES = {401: "Invalid Credentials", 404: "No such object", 412: "A precondition did not hold."}


class Google:
    """Answers requests for one bucket, whose resumable uploads it holds in memory."""

    def __init__(self, objects: Objects):
        self._objects = objects
        # Session -> (name, query of its first request, content so far).
        self._sessions: dict[str, tuple[str, dict[str, str], bytes]] = {}

    def answer(self, request: Request) -> Reply:
        path = re.sub(r"^(/upload|/download)?/storage/v1/b/", "", request.path)
        bucket, _, rest = path.partition("/")
        try:
            if request.path.startswith("/upload/"):
                reply = self._upload(bucket, request)
            elif rest == "o" and request.method == "GET":
                reply = self._list(bucket, request.query)
            elif rest.startswith("o/"):
                reply = self._answer_for(bucket, rest.removeprefix("o/"), request)
            elif rest == "iam/testPermissions":
                reply = _json({"permissions": [request.query["permissions"]]})
            elif not rest and request.method == "GET":
                reply = _json({"kind": "storage#bucket", "id": bucket, "name": bucket})
            else:
                reply = Reply(501)
        except PreconditionFailed:
            reply = Reply(412)
        return refused(reply.status) if reply.status >= 400 and not reply.body else reply

    def _list(self, bucket: str, query: dict[str, str]) -> Reply:
        limit = min(_PAGE, int(query.get("maxResults", _PAGE)), int(query["page"]))
        after = query.get("pageToken", "")
        listing = self._objects.list(
            query.get("prefix", ""), query.get("delimiter", ""), after, limit
        )
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        # The offsets cut a page after it was made, which a listing may answer with a short page.
        within = [o for o in listing.objects if o.name >= first and not (end and o.name >= end)]
        items = [_described(bucket, found) for found in within]
        page: dict[str, Any] = {
            "kind": "storage#objects",
            "items": items,
            "prefixes": listing.groups,
        }
        return _json(page | ({"nextPageToken": listing.more} if listing.more else {}))

    def _answer_for(self, bucket: str, path: str, request: Request) -> Reply:
        name, _, target = path.partition("/")
        name, query = unquote(name), request.query
        if request.method == "POST":
            return self._copy(bucket, name, target, query)
        if request.method == "DELETE":
            was_there = self._objects.delete(name, lambda found: _fits(found, query))
            return Reply(204, deleted=[name]) if was_there else Reply(404)
        found = self._objects.read(name)
        if found is None or query.get("generation", str(found[0].generation)) != str(
            found[0].generation
        ):
            return Reply(404)
        if not _fits(found[0], query):
            return Reply(412)
        if query.get("ifGenerationNotMatch") == str(found[0].generation):
            return Reply(304)
        if query.get("alt") == "media":
            size = str(found[0].size)
            headers = {"x-goog-generation": str(found[0].generation), "x-goog-metageneration": "1"}
            return send(found, request, headers | {"x-goog-stored-content-length": size})
        return _json(_described(bucket, found[0]))

    def _copy(self, bucket: str, name: str, target: str, query: dict[str, str]) -> Reply:
        match = re.fullmatch(r"(rewriteTo|copyTo|moveTo)(?:/b/[^/]+)?/o/([^/]+)", target)
        found = self._objects.read(name)
        if match is None or found is None:
            return Reply(404 if match else 501)
        reply = self._write(bucket, unquote(match[2]), found[1], query, match[1] == "rewriteTo")
        if match[1] == "moveTo":
            self._objects.delete(name)
            reply.deleted.append(name)
        return reply

    def _write(
        self,
        bucket: str,
        name: str,
        content: bytes,
        query: dict[str, str],
        is_rewrite: bool = False,
    ) -> Reply:
        new = self._objects.write(name, content, lambda found: _fits(found, query))
        said: dict[str, Any] = _described(bucket, new)
        if is_rewrite:
            size = said["size"]
            said = {"done": True, "resource": said, "objectSize": size, "totalBytesRewritten": size}
        return _json(said, written=[name])

    def _upload(self, bucket: str, request: Request) -> Reply:
        kind, query = request.query.get("uploadType"), request.query
        if session := query.get("upload_id"):
            return self._resume(bucket, session, request)
        if kind == "media":
            return self._write(bucket, query["name"], request.body, query)
        if kind == "multipart":
            about, content = _parts(request)
            return self._write(bucket, about.get("name") or query["name"], content, query)
        session = uuid.uuid4().hex
        about = json.loads(request.body or b"{}")
        name = query.get("name") or about["name"]
        # The store refuses a session at once; a precondition is tested again at the end.
        if not _fits(self._objects.find(name), query):
            return Reply(412)
        self._sessions[session] = (name, query, b"")
        host = request.headers["Host"]
        address = f"http://{host}{request.path}?uploadType=resumable&upload_id={session}"
        return Reply(200, headers={"Location": address, "X-GUploader-UploadID": session})

    def _resume(self, bucket: str, session: str, request: Request) -> Reply:
        if session not in self._sessions:
            return Reply(404)
        if request.method == "DELETE":
            del self._sessions[session]
            return Reply(499)
        name, query, content = self._sessions[session]
        spread, _, total = request.headers.get("Content-Range", "bytes 0-/*")[6:].partition("/")
        if spread != "*":
            # A client may send again what the store has already.
            content = content[: int(spread.partition("-")[0])] + request.body
        is_whole = "Content-Range" not in request.headers or total == str(len(content))
        if is_whole:
            reply = self._write(bucket, name, content, query)
            del self._sessions[session]
            return reply
        self._sessions[session] = (name, query, content)
        return Reply(308, headers={"Range": f"bytes=0-{len(content) - 1}"} if content else {})


def refused(status: int) -> Reply:
    message, reason = _MESSAGES.get(status, "Refused"), _REASONS.get(status, "backendError")
    errors = [{"reason": reason, "message": message, "domain": "global"}]
    reply = _json({"error": {"code": status, "message": message, "errors": errors}})
    reply.status = status
    return reply


def _json(value: Any, **changes: list[str]) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, **changes)


def _described(bucket: str, found: Object) -> dict[str, str]:
    changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", found.changed)
    return {
        "kind": "storage#object",
        "name": found.name,
        "bucket": bucket,
        "size": str(found.size),
        "generation": str(found.generation),
        "metageneration": "1",
        "etag": found.etag,
        "timeCreated": changed,
        "updated": changed,
    }


def _fits(found: Object | None, query: dict[str, str]) -> bool:
    wanted = query.get("ifGenerationMatch")
    return wanted is None or wanted == str(found.generation if found else 0)


def _parts(request: Request) -> tuple[dict[str, Any], bytes]:
    """Return what a multipart upload says about its object, and the content."""
    boundary = re.search(r'boundary="?([^";]+)', request.headers["Content-Type"])
    assert boundary is not None
    mark = b"--" + boundary[1].encode()
    # The content may contain the boundary's text, so only the first two and the last count.
    _, about, content = request.body.split(mark, 2)
    content = content[: content.rindex(mark)]
    texts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content)]
    return json.loads(texts[0]), re.sub(rb"\r?\n\Z", b"", texts[1])
