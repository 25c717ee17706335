"""A folder served as an S3 bucket on loopback: listing, sizes, and reads of ranges."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
_CHANGED = "Thu, 01 Jan 2026 00:00:00 GMT"


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        address = urlsplit(self.path)
        _, bucket, *key = unquote(address.path).split("/", 2)
        name = key[0] if key else ""
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        file = self.folder / name
        if bucket != BUCKET:
            self._reply(404)
        elif not name:
            self._reply(200, self._list(query))
        elif not file.is_file():
            self._reply(404)
        else:
            self._send_file(file)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        paths = sorted(p for p in self.folder.rglob("*") if p.is_file())
        keys = [p.relative_to(self.folder).as_posix() for p in paths]
        keys = [key for key in keys if key.startswith(prefix)]
        groups = set()
        if delimiter:
            cut = {key: key[len(prefix) :].split(delimiter, 1) for key in keys}
            groups = {prefix + parts[0] + delimiter for parts in cut.values() if len(parts) > 1}
            keys = [key for key in keys if len(cut[key]) == 1]
        keys, more = keys[: int(query.get("max-keys", 1000))], False
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(self.folder / key).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        contents += "".join(
            f"<CommonPrefixes><Prefix>{escape(group)}</Prefix></CommonPrefixes>"
            for group in sorted(groups)
        )
        count = len(keys) + len(groups)
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{contents}"
            "</ListBucketResult>"
        ).encode()

    def _send_file(self, file: Path) -> None:
        content, headers, status = file.read_bytes(), {}, 200
        if asked := self.headers.get("Range"):
            size = len(content)
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or size - 1), size - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            content, status = content[start:stop], 206
        self._reply(status, content, headers)

    def _reply(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        always = {"Content-Length": str(len(content)), "Last-Modified": _CHANGED, "ETag": '"1"'}
        for name, value in (always | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """What to put behind an address s3://bucket/... while this is open."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield (
                f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
            )
        finally:
            server.shutdown()
            thread.join()
