"""S3's protocol: https://docs.aws.amazon.com/AmazonS3/latest/API, with paths of the form /bucket/key."""

import re
import time
import uuid
from urllib.parse import unquote
from xml.sax.saxutils import escape, unescape

from tests.object_store.objects import (
    Object,
    Objects,
    PreconditionFailed,
    Reply,
    Request,
    http_time,
    send,
)

_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_REASONS = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    501: "NotImplemented",
    503: "SlowDown",
}
_PAGE = 1000


class Amazon:
    """Answers requests for one bucket, whose multipart uploads it holds in memory."""

    def __init__(self, objects: Objects):
        self._objects = objects
        self._uploads: dict[str, dict[int, bytes]] = {}

    def answer(self, request: Request) -> Reply:
        _, bucket, *key = unquote(request.path).split("/", 2)
        try:
            if key and key[0]:
                return self._with_reason(self._answer_for(key[0], request))
            return self._answer_for_bucket(bucket, request)
        except PreconditionFailed:
            return refused(412)

    @staticmethod
    def _with_reason(reply: Reply) -> Reply:
        return refused(reply.status) if reply.status >= 400 and not reply.body else reply

    def _answer_for_bucket(self, bucket: str, request: Request) -> Reply:
        if request.method == "POST" and "delete" in request.query:
            names = [
                unescape(name) for name in re.findall(r"<Key>(.*?)</Key>", request.body.decode())
            ]
            deleted = [name for name in names if self._objects.delete(name)]
            each = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            return _xml("DeleteResult", each, deleted=deleted)
        if request.method == "HEAD":
            return Reply(200)
        if "location" in request.query:
            return _xml("LocationConstraint", "us-east-1")
        if request.method == "GET":
            return self._list(bucket, request.query)
        return refused(501)

    def _list(self, bucket: str, query: dict[str, str]) -> Reply:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = (
            query.get("continuation-token") or query.get("start-after") or query.get("marker", "")
        )
        limit = min(_PAGE, int(query.get("max-keys", _PAGE)), int(query["page"]))
        listing = self._objects.list(prefix, delimiter, after, limit)
        content = "".join(
            f"<Contents><Key>{escape(found.name)}</Key><Size>{found.size}</Size>"
            f"<ETag>{escape(found.etag)}</ETag><LastModified>{_stamp(found)}</LastModified>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for found in listing.objects
        )
        content += "".join(
            f"<CommonPrefixes><Prefix>{escape(group)}</Prefix></CommonPrefixes>"
            for group in listing.groups
        )
        if listing.more:
            more = escape(listing.more)
            content += f"<NextContinuationToken>{more}</NextContinuationToken><NextMarker>{more}</NextMarker>"
        head = (
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys>"
            f"<KeyCount>{len(listing.objects) + len(listing.groups)}</KeyCount>"
            f"<IsTruncated>{str(bool(listing.more)).lower()}</IsTruncated>"
        )
        return _xml("ListBucketResult", head + content)

    def _answer_for(self, name: str, request: Request) -> Reply:
        upload = request.query.get("uploadId")
        if request.method == "POST" and "uploads" in request.query:
            upload = uuid.uuid4().hex
            self._uploads[upload] = {}
            return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if upload is not None:
            return self._answer_for_upload(name, upload, request)
        if request.method in ("GET", "HEAD"):
            return self._read(name, request)
        if request.method == "PUT":
            return self._put(name, request)
        if request.method == "DELETE":
            was_there = self._objects.delete(name, lambda found: _fits(found, request))
            return Reply(204, deleted=[name] * was_there)
        return refused(501)

    def _read(self, name: str, request: Request) -> Reply:
        found = self._objects.read(name)
        if found:
            if not _fits(found[0], request, "If-Match"):
                return refused(412)
            if request.headers.get("If-None-Match") in (found[0].etag, "*"):
                return Reply(304, headers={"ETag": found[0].etag})
        return send(found, request, {"Accept-Ranges": "bytes"})

    def _put(self, name: str, request: Request) -> Reply:
        source = request.headers.get("x-amz-copy-source")
        content = request.body
        if source:
            found = self._objects.read(unquote(source).lstrip("/").partition("/")[2])
            if found is None:
                return Reply(404)
            content = found[1]
        elif "If-Match" in request.headers and self._objects.find(name) is None:
            return Reply(404)
        new = self._objects.write(name, content, lambda found: _fits(found, request))
        if source:
            text = f"<ETag>{escape(new.etag)}</ETag><LastModified>{_stamp(new)}</LastModified>"
            return _xml("CopyObjectResult", text, written=[name])
        return Reply(200, headers=_etag(new), written=[name])

    def _answer_for_upload(self, name: str, upload: str, request: Request) -> Reply:
        parts = self._uploads.get(upload)
        if parts is None:
            return refused(404, "NoSuchUpload")
        if request.method == "PUT":
            number = int(request.query["partNumber"])
            parts[number] = request.body
            return Reply(200, headers={"ETag": f'"{upload}-{number}"'})
        if request.method == "DELETE":
            del self._uploads[upload]
            return Reply(204)
        named = re.findall(r"<PartNumber>(\d+)</PartNumber>", request.body.decode())
        if any(int(number) not in parts for number in named) or not named:
            return refused(400, "InvalidPart")
        content = b"".join(parts[int(number)] for number in named)
        new = self._objects.write(name, content, lambda found: _fits(found, request))
        del self._uploads[upload]
        text = f"<Key>{escape(name)}</Key><ETag>{escape(new.etag)}</ETag>"
        return _xml("CompleteMultipartUploadResult", text, written=[name])


def refused(status: int, reason: str = "") -> Reply:
    code = reason or _REASONS.get(status, "InternalError")
    text = f"<Code>{code}</Code><Message>{code}</Message>"
    return Reply(
        status, f"{_XML}<Error>{text}</Error>".encode(), {"Content-Type": "application/xml"}
    )


def _xml(kind: str, text: str, **changes: list[str]) -> Reply:
    body = f"{_XML}<{kind} {_NAMESPACE}>{text}</{kind}>".encode()
    return Reply(200, body, {"Content-Type": "application/xml"}, **changes)


def _fits(found: Object | None, request: Request, *headers: str) -> bool:
    """Return whether an object is as the request's If-Match and If-None-Match want it."""
    wanted = {name: request.headers.get(name) for name in headers or ("If-Match", "If-None-Match")}
    if etag := wanted.get("If-Match"):
        return found is not None and etag in ("*", found.etag)
    if etag := wanted.get("If-None-Match"):
        return found is None or etag not in ("*", found.etag)
    return True


def _etag(found: Object) -> dict[str, str]:
    return {"ETag": found.etag, "Last-Modified": http_time(found)}


def _stamp(found: Object) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", found.changed)
