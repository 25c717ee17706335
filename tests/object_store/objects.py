"""The objects of a bucket, each an ordinary file in a folder, and what a request and its reply hold."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

# A name may end in a slash, as clients write it for an empty folder; a file's name cannot.
_FOLDER_MARK = "%"


class Object(NamedTuple):
    """What a listing says about an object. Each write gives it a higher generation."""

    name: str
    size: int
    generation: int

    @property
    def etag(self) -> str:
        return f'"{self.generation:x}"'

    @property
    def changed(self) -> time.struct_time:
        return time.gmtime(self.generation / 1e9)


class Listing(NamedTuple):
    """One page of a listing; `more` is the last entry of the page if others follow."""

    objects: list[Object]
    groups: list[str]
    more: str


class PreconditionFailed(Exception):  # noqa: N818
    """A request asks for another generation than the object has."""


Condition = Callable[[Object | None], bool]


@dataclasses.dataclass
class Request:
    """A request with its whole body; `path` is still quoted."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes = b""


@dataclasses.dataclass
class Reply:
    """An answer, and the names of the objects that the request has written or deleted.

    `is_content` tells whether the body is content of an object.
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    written: list[str] = dataclasses.field(default_factory=list)
    deleted: list[str] = dataclasses.field(default_factory=list)
    is_content: bool = False


class Objects:
    """A folder read and written as a bucket. A file's time of change, in ns, is its generation."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.RLock()
        self._newest = 0

    def find(self, name: str) -> Object | None:
        path = self._path(name)
        return _described(name, path) if path.is_file() else None

    def read(self, name: str) -> tuple[Object, bytes] | None:
        with self._lock:
            found = self.find(name)
            return found and (found, self._path(name).read_bytes())

    def write(self, name: str, content: bytes, condition: Condition = lambda _: True) -> Object:
        """Write an object at once or not at all. Raise PreconditionFailed if the present one is unfit."""
        path = self._path(name)
        # A hidden neighbour of the folder is on the same file system, and in no listing.
        new = self._folder.with_name(f".{self._folder.name}.new")
        with self._lock:
            if not condition(self.find(name)):
                raise PreconditionFailed
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(content)
            # The kernel's own times of two writes may be equal.
            self._newest = max(self._newest + 1, time.time_ns())
            os.utime(new, ns=(self._newest, self._newest))
            new.replace(path)
            return _described(name, path)

    def delete(self, name: str, condition: Condition = lambda _: True) -> bool:
        """Delete an object and return whether it was there, or raise PreconditionFailed."""
        with self._lock:
            found = self.find(name)
            if found is None:
                return False
            if not condition(found):
                raise PreconditionFailed
            path = self._path(name)
            path.unlink()
            # A bucket has no empty folders.
            for parent in path.parents:
                if parent == self._folder or any(parent.iterdir()):
                    break
                parent.rmdir()
            return True

    def list(self, prefix: str, delimiter: str, after: str, at_most: int) -> Listing:
        """Return the entries after `after`: objects, and groups with a common prefix."""
        with self._lock:
            named = {name: path for name, path in self._files(prefix) if name.startswith(prefix)}
            entries = {_group(name, prefix, delimiter) or name for name in named}
            later = sorted(entry for entry in entries if entry > after)
            page = later[:at_most]
            objects = [_described(name, named[name]) for name in page if name in named]
        groups = [entry for entry in page if entry not in named]
        return Listing(objects, groups, page[-1] if len(later) > len(page) else "")

    def _files(self, prefix: str):
        start = self._folder / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                yield path.relative_to(self._folder).as_posix().removesuffix(_FOLDER_MARK), path

    def _path(self, name: str) -> Path:
        return self._folder / (f"{name}{_FOLDER_MARK}" if name.endswith("/") else name)


def _described(name: str, path: Path) -> Object:
    status = path.stat()
    return Object(name, status.st_size, status.st_mtime_ns)


def _group(name: str, prefix: str, delimiter: str) -> str:
    rest = name[len(prefix) :]
    if not delimiter or delimiter not in rest:
        return ""
    return prefix + rest.split(delimiter, 1)[0] + delimiter


def send(found: tuple[Object, bytes] | None, request: Request, headers: dict[str, str]) -> Reply:
    """Return the reply with the content of an object, or with the range that the request asks for."""
    if found is None:
        return Reply(404)
    content = found[1]
    headers = {"ETag": found[0].etag, "Last-Modified": http_time(found[0])} | headers
    asked = request.headers.get("Range")
    if not asked:
        return Reply(200, content, headers, is_content=True)
    size = len(content)
    first, last = asked.removeprefix("bytes=").split("-")
    start = int(first) if first else max(0, size - int(last))
    stop = min(int(last), size - 1) + 1 if first and last else size
    if start >= size:
        return Reply(416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(206, content[start:stop], headers, is_content=True)


def http_time(found: Object) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", found.changed)
