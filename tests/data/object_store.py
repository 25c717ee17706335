"""A folder served on loopback as a bucket of S3 and of Google: listing, sizes, reads of ranges."""

import http.server
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
_CHANGED = "Thu, 01 Jan 2026 00:00:00 GMT"
_OPTIONS = {"s3": "region=us-east-1", "gs": "retry_limit_seconds=3"}


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        of_google = address.path.startswith("/storage/v1/b/")
        answer = self._as_google if of_google else self._as_amazon
        answer(address.path.removeprefix("/storage/v1/b"), query)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass

    def _as_amazon(self, path: str, query: dict[str, str]) -> None:
        _, bucket, *key = unquote(path).split("/", 2)
        name = key[0] if key else ""
        if bucket != BUCKET:
            self._reply(404)
        elif not name:
            self._reply(200, self._listed_by_amazon(query))
        else:
            self._send_file(self.folder / name)

    def _as_google(self, path: str, query: dict[str, str]) -> None:
        _, bucket, _, *key = path.split("/", 3)
        name = unquote(key[0]) if key else ""
        if bucket != BUCKET:
            self._reply(404)
        elif not name:
            names, groups = self._listed(query)
            items = {"items": [self._object(name) for name in names], "prefixes": groups}
            self._reply(200, json.dumps(items).encode())
        elif query.get("alt") == "media" or not (self.folder / name).is_file():
            self._send_file(self.folder / name)
        else:
            self._reply(200, json.dumps(self._object(name)).encode())

    def _object(self, name: str) -> dict[str, str]:
        size = str((self.folder / name).stat().st_size)
        changed = "2026-01-01T00:00:00Z"
        return {"name": name, "bucket": BUCKET, "size": size, "generation": "1", "updated": changed}

    def _listed(self, query: dict[str, str]) -> tuple[list[str], list[str]]:
        """Names of files, and with a delimiter of what would be folders."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        paths = sorted(p for p in self.folder.rglob("*") if p.is_file())
        names = [p.relative_to(self.folder).as_posix() for p in paths]
        names = [name for name in names if name.startswith(prefix)]
        if not delimiter:
            return names, []
        cut = {name: name[len(prefix) :].split(delimiter, 1) for name in names}
        groups = {prefix + parts[0] + delimiter for parts in cut.values() if len(parts) > 1}
        return [name for name in names if len(cut[name]) == 1], sorted(groups)

    def _listed_by_amazon(self, query: dict[str, str]) -> bytes:
        names, groups = self._listed(query)
        names = names[: int(query.get("max-keys", 1000))]
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(self.folder / name).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in names
        )
        contents += "".join(
            f"<CommonPrefixes><Prefix>{escape(group)}</Prefix></CommonPrefixes>" for group in groups
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(query.get('prefix', ''))}</Prefix>"
            f"<KeyCount>{len(names) + len(groups)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        ).encode()

    def _send_file(self, file: Path) -> None:
        if not file.is_file():
            self._reply(404)
            return
        content, headers, status = file.read_bytes(), {}, 200
        if asked := self.headers.get("Range"):
            size = len(content)
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or size - 1), size - 1) + 1
            if start >= size:
                self._reply(416, headers={"Content-Range": f"bytes */{size}"})
                return
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
def serve(folder: Path) -> Iterator[Callable[[str], str]]:
    """A function that adds what it needs to s3://bucket/... and gs://bucket/..., while this is open.

    A process of its own answers: some calls of Arrow's client of gs:// keep the interpreter's lock.
    """
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        at = f"?endpoint_override=127.0.0.1:{server.stdout.readline().strip()}&scheme=http&"
        try:
            yield lambda address: address + at + _OPTIONS[address.partition(":")[0]]
        finally:
            server.kill()


if __name__ == "__main__":
    _Handler.folder = Path(sys.argv[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        print(running.server_port, flush=True)
        running.serve_forever()
