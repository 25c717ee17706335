"""A folder served on loopback as a bucket of S3 and of Google, read and written, with faults on command."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.object_store.server import BUCKET, READONLY, Faults

__all__ = ["BUCKET", "READONLY", "Store", "serve"]

_OPTIONS = {"s3": "region=us-east-1", "gs": "retry_limit_seconds=3"}


@dataclasses.dataclass(frozen=True)
class Store:
    """A served folder; each object is the file of the same name in it."""

    folder: Path
    port: int

    def __call__(self, address: str) -> str:
        """Return s3://bucket/... or gs://bucket/... with the options that Arrow's client needs."""
        at = f"?endpoint_override=127.0.0.1:{self.port}&scheme=http&"
        return address + at + _OPTIONS[address.partition(":")[0]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which gcsfs, s3fs, botocore and TensorStore find this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            # gcsfs would look for a minute for a service of Google's that this server does not have.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS": json.dumps({"token": "anon"}),
            "FSSPEC_GCS": json.dumps({"token": "anon"}),
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextmanager
    def faults(self, **given: Any) -> Iterator[None]:
        """Set the server's `Faults` for a block."""
        self._ask("PUT", "/faults", dataclasses.asdict(Faults(**given)))
        try:
            yield
        finally:
            self._ask("PUT", "/faults", dataclasses.asdict(Faults()))

    def log(self) -> list[dict[str, Any]]:
        """Return all requests so far, as the server's `_note` describes them."""
        return json.loads(self._ask("GET", "/log"))

    def writers(self) -> dict[str, list[int]]:
        """Return the process ids that have written each object, one for each write."""
        found: dict[str, list[int]] = {}
        for entry in self.log():
            for name in entry["written"]:
                found.setdefault(name, []).append(entry["process"])
        return found

    def _ask(self, method: str, path: str, value: Any = None) -> bytes:
        body = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(self.url + path, body, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()


@contextmanager
def serve(folder: Path) -> Iterator[Store]:
    """Serve a folder while this is open.

    A process of its own answers: some calls of Arrow's client of gs:// keep the interpreter's lock.
    """
    command = [sys.executable, "-m", "tests.object_store.server", str(folder)]
    root = Path(__file__).parents[2]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) as server:
        assert server.stdout is not None
        try:
            yield Store(folder, int(server.stdout.readline()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()
