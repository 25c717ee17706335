"""The server of an emulated bucket: HTTP, faults on command, and a log of requests.

The buckets are `bucket` and `readonly`, which show the same objects; others do not exist. PUT /faults sets
faults, and GET /log returns the requests so far.
"""

import dataclasses
import functools
import http.server
import io
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.object_store import amazon, google
from tests.object_store.objects import Objects, Reply, Request

BUCKET = "bucket"
READONLY = "readonly"
_OWN_PATHS = ("/faults", "/log")


@dataclasses.dataclass
class Faults:
    """Faults of requests whose address contains `where`; shares lie between 0 and 1.

    Attributes:
        errors: the share of requests that are answered `status` and change nothing.
        lost: the share of requests that take effect and are answered `status`.
        status: the status of errors.
        reason: the code of errors of S3; '' is that of the status.
        cut: the share of uploads whose connection ends in the middle of the body.
        broken: the share of downloads whose connection ends in the middle of the content.
        delay: the longest time in seconds before an answer.
        is_expired: whether the credentials are refused.
        page: the most entries in a page of a listing.
    """

    where: str = ""
    errors: float = 0.0
    lost: float = 0.0
    status: int = 503
    reason: str = ""
    cut: float = 0.0
    broken: float = 0.0
    delay: float = 0.0
    is_expired: bool = False
    page: int = 1000
    seed: int = 0


class _State:
    """All that the connections share."""

    def __init__(self, folder: Path):
        objects = Objects(folder)
        self.amazon, self.google = amazon.Amazon(objects), google.Google(objects)
        self.log: list[dict] = []
        self.set_faults(Faults())

    def set_faults(self, faults: Faults) -> None:
        self.faults, self._random = faults, random.Random(faults.seed)

    def happens(self, share: float) -> bool:
        return self._random.random() < share

    def pause(self) -> float:
        return self._random.uniform(0, self.faults.delay)


class _Handler(http.server.BaseHTTPRequestHandler):
    state: _State
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _handle(self) -> None:
        address = urlsplit(self.path)
        state, faults = self.state, self.state.faults
        is_faulty = faults.where in unquote(self.path) and address.path not in _OWN_PATHS
        size = int(self.headers.get("Content-Length", 0))
        if is_faulty and size > 1 and state.happens(faults.cut):
            self.rfile.read(size // 2)
            self._note(address.path, Reply(0))
            self.close_connection = True
            return
        body = self._body(size)
        if body is None:
            self.close_connection = True
            return
        # Some uploads name the object in their body.
        is_faulty = is_faulty or (
            address.path not in _OWN_PATHS and faults.where.encode() in body[:500]
        )
        query = dict(parse_qsl(address.query, keep_blank_values=True)) | {"page": str(faults.page)}
        request = Request(self.command, address.path, query, self.headers, body)
        if is_faulty and faults.delay:
            time.sleep(state.pause())
        refusal = self._refusal(address.path, is_faulty)
        reply = refusal or self._answer(request)
        if is_faulty and not refusal and state.happens(faults.lost):
            refused = self._refused(faults.status, faults.reason)
            reply = dataclasses.replace(refused, written=reply.written, deleted=reply.deleted)
        is_broken = is_faulty and not refusal and state.happens(faults.broken)
        self._note(address.path, reply)
        self._send(reply, is_broken=is_broken and reply.is_content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    @property
    def _is_google(self) -> bool:
        return any(part in self.path[:20] for part in ("/storage/v1", "/upload/"))

    def _refused(self, status: int, reason: str = "") -> Reply:
        if self._is_google:
            return google.refused(status)
        return (
            amazon.refused(403, "ExpiredToken") if status == 401 else amazon.refused(status, reason)
        )

    def _refusal(self, path: str, is_faulty: bool) -> Reply | None:
        """Return the reply to a request that does not reach the objects."""
        if not is_faulty:
            return None
        if self.state.faults.is_expired:
            return self._refused(401)
        if self.state.happens(self.state.faults.errors):
            return self._refused(self.state.faults.status, self.state.faults.reason)
        bucket = path.partition("/b/")[2] if self._is_google else path[1:]
        bucket = bucket.partition("/")[0]
        if bucket not in (BUCKET, READONLY):
            return self._refused(404) if self._is_google else amazon.refused(404, "NoSuchBucket")
        is_denied = bucket == READONLY and self.command in ("PUT", "POST", "DELETE")
        return self._refused(403) if is_denied else None

    def _answer(self, request: Request) -> Reply:
        if request.path == "/faults":
            self.state.set_faults(Faults(**json.loads(request.body)))
            return Reply(204)
        if request.path == "/log":
            return Reply(200, json.dumps(self.state.log).encode())
        return (self.state.google if self._is_google else self.state.amazon).answer(request)

    def _body(self, size: int) -> bytes | None:
        """Return the body of a request, None if the client has ended before its last byte."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = _chunked(self.rfile)
        else:
            body = self.rfile.read(size)
            if len(body) < size:
                return None
        if "x-amz-decoded-content-length" in self.headers:
            return _chunked(io.BytesIO(body or b""))
        return body

    def _send(self, reply: Reply, *, is_broken: bool) -> None:
        self.send_response(reply.status)
        # S3's clients ask for the region of a bucket by any request.
        always = {"Content-Length": str(len(reply.body)), "x-amz-bucket-region": "us-east-1"}
        for name, value in (always | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if is_broken else reply.body)
        self.close_connection = self.close_connection or is_broken

    def _note(self, path: str, reply: Reply) -> None:
        if path in _OWN_PATHS:
            return
        self.state.log.append(
            {
                "seconds": time.time(),
                "process": self._process,
                "method": self.command,
                "path": path,
                "status": reply.status,
                "sent": reply.is_content,
                "written": reply.written,
                "deleted": reply.deleted,
            }
        )

    @functools.cached_property
    def _process(self) -> int | None:
        """The id of the process at the other end of the connection."""
        return _process_at(self.client_address[1], self.server.server_address[1])  # type: ignore[index]


def _chunked(stream) -> bytes | None:
    """Return the content of a body in chunks, without trailers; None if its end is missing."""
    content = b""
    while line := stream.readline():
        size = int(line.split(b";")[0], 16)
        content += stream.read(size)
        if not size:
            while stream.readline().strip():
                pass
            return content
        stream.readline()
    return None


def _process_at(port: int, own_port: int) -> int | None:
    """Return the id of the process on this machine that connects from a port, by Linux's own tables."""
    ends = f"0100007F:{port:04X} 0100007F:{own_port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    wanted = [f"socket:[{line.split()[9]}]" for line in lines if ends in line]
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            for entry in os.scandir(folder):
                if os.readlink(entry.path) in wanted:
                    return int(folder.parent.name)
        except OSError:
            # The process or the descriptor has ended meanwhile.
            continue
    return None


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *where):
        # Clients that are killed, or give up, end their connections.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*where)


if __name__ == "__main__":
    _Handler.state = _State(Path(sys.argv[1]))
    with _Server(("127.0.0.1", 0), _Handler) as running:
        print(running.server_port, flush=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        # The starter's end closes this pipe, however it ends.
        sys.stdin.read()
        running.shutdown()
